package namespace

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// supervised is a command whose parent is its launcher.
type supervised struct {
	pid  int
	done chan struct{} // closed when there are no more reports

	exit string // written before done is closed

	mu    sync.Mutex // guards the following
	pidfd *os.File   // nil when the command has ended
}

// newSupervised takes the launcher's further reports, and a pidfd of the command.
func newSupervised(reports *net.UnixConn, pidfd *os.File) (*supervised, error) {
	pid, err := pidOf(pidfd)
	if err != nil {
		return nil, errors.Join(err, pidfd.Close(), reports.Close())
	}
	s := &supervised{pid: pid, pidfd: pidfd, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		report, file, err := readReport(reports)
		if err == nil {
			s.exit = report.Exit
		}
		if file != nil {
			_ = file.Close()
		}
		_ = reports.Close()
	}()
	return s, nil
}

// pidOf returns the process id of a pidfd in this process's PID namespace; see pidfd_open(2).
func pidOf(pidfd *os.File) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd.Fd()))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		if value, found := bytes.CutPrefix(line, []byte("Pid:")); found {
			pid, err := strconv.Atoi(string(bytes.TrimSpace(value)))
			if err != nil {
				return 0, fmt.Errorf("process id of the command: %w", err)
			}
			return pid, nil // -1 if it has ended already
		}
	}
	return 0, errors.New("this kernel does not tell the process of a pidfd")
}

// signal sends a signal to the command.
func (s *supervised) signal(sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pidfd == nil {
		return nil
	}
	err := unix.PidfdSendSignal(int(s.pidfd.Fd()), sig, nil, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", s.pid, err)
	}
	return nil
}

// finish returns when the last report is read. The launcher has ended.
func (s *supervised) finish() {
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.pidfd.Close()
	s.pidfd = nil
}
