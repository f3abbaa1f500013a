package firecracker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
)

// nameMetrics is the named pipe in a Firecracker's directory into which it writes its metrics.
const nameMetrics = "metrics"

// maxMetrics is the longest line of metrics that is read, in bytes. One of 1.12 has some 10 KB.
const maxMetrics = 1 << 20

// metrics adds up what a Firecracker tells of its drives. It writes a line each minute and when
// it is told to, and each counts from the line before.
type metrics struct {
	pipe *os.File

	mu   sync.Mutex // guards the following
	sum  smolvm.DiskUsage
	came chan struct{} // closed when the next line has come, or none will
	err  error         // why none will
}

// openMetrics makes the pipe. Firecracker opens it by its name, and does not wait for its reader.
func openMetrics(dir *runDir) (*metrics, error) {
	m := &metrics{came: make(chan struct{})}
	err := dir.within(func(path string) (err error) {
		path = filepath.Join(path, nameMetrics)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return err
		}
		// Open for writing too, it has no end while Firecracker has not opened it yet.
		m.pipe, err = os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
		return err
	})
	if err == nil {
		err = dir.own(nameMetrics)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the pipe of metrics: %w", err), m.close())
	}
	return m, nil
}

// read reads lines until the pipe is closed.
func (m *metrics) read() {
	lines := bufio.NewScanner(m.pipe)
	lines.Buffer(nil, maxMetrics)
	for lines.Scan() {
		m.add(lines.Bytes())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = errEnded
	if err := lines.Err(); err != nil && !errors.Is(err, os.ErrClosed) {
		m.err = fmt.Errorf("read Firecracker's metrics: %w", err)
	}
	close(m.came)
}

// add adds what a line tells. One that can't be read tells nothing.
func (m *metrics) add(text []byte) {
	var line struct {
		// Block is all drives together.
		Block struct {
			Read    int64 `json:"read_bytes"`
			Written int64 `json:"write_bytes"`
			Reads   int64 `json:"read_count"`
			Writes  int64 `json:"write_count"`
		} `json:"block"`
	}
	if json.Unmarshal(text, &line) != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sum.Read += line.Block.Read
	m.sum.Written += line.Block.Written
	m.sum.Reads += line.Block.Reads
	m.sum.Writes += line.Block.Writes
	close(m.came)
	m.came = make(chan struct{})
}

// next returns a channel that is closed when a line has come, or none will.
func (m *metrics) next() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.came
}

func (m *metrics) usage() (smolvm.DiskUsage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sum, m.err
}

func (m *metrics) close() error {
	if m.pipe == nil {
		return nil
	}
	return m.pipe.Close()
}

// DiskUsage implements [vmm.Meter].
func (i *instance) DiskUsage(ctx context.Context) (smolvm.DiskUsage, error) {
	came := i.metrics.next()
	if err := i.api.Do(ctx, api.FlushMetrics); err != nil {
		return smolvm.DiskUsage{}, err
	}
	select {
	case <-came:
		return i.metrics.usage()
	case <-i.done:
		return smolvm.DiskUsage{}, errEnded
	case <-ctx.Done():
		return smolvm.DiskUsage{}, context.Cause(ctx)
	}
}
