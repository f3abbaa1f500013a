package process

import (
	"bufio"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/smolvm/smolvm/internal/shim"
)

// launcher is the process that has started the shim, or claimed it.
type launcher struct {
	reports   *os.File
	log       *slog.Logger
	committed chan struct{} // closed when it has confirmed the start
	gone      chan struct{} // closed when its end of the pipe closes
}

// follow returns a launcher whose orders are read to their end.
func follow(orders *bufio.Reader, reports *os.File, log *slog.Logger) *launcher {
	l := &launcher{reports: reports, log: log, committed: make(chan struct{}), gone: make(chan struct{})}
	go func() {
		defer close(l.gone)
		line, err := orders.ReadString('\n')
		if err != nil || strings.TrimSpace(line) != shim.CommitOrder {
			return
		}
		close(l.committed)
		_, _ = io.Copy(io.Discard, orders)
	}()
	return l
}

// report tells the launcher; if it is gone, that is noticed elsewhere.
func (l *launcher) report(r shim.Report) {
	line, err := json.Marshal(r)
	if err == nil {
		_, err = l.reports.Write(append(line, '\n'))
	}
	if err != nil {
		l.log.Warn("report to launcher", "error", err)
	}
}

// close ends the reports: there are no more.
func (l *launcher) close() { _ = l.reports.Close() }
