// Package worker has work done in a process of its own, which is the program that serves as
// shim: it goes on when the process that wanted it is over.
//
// A worker reads its orders, a line of JSON, on its standard input, and reports what it has
// made, or why it could not, on a pipe that it inherits. It knows neither templates nor pools:
// what the orders mean is its user's.
package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"github.com/smolvm/smolvm/internal/errcode"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
)

// argument tells people who look at the host's processes what one is.
const argument = "task"

// Options are the options of [Start].
type Options struct {
	// Program is what serves as shim, with its arguments.
	Program []string
	// Orders are what the worker is to do, in a form that encodes as JSON.
	Orders any
	// LogPath is the file to which the worker's output is appended; see package ring.
	LogPath string
	// Lock is the worker's from then on, as long as it lives; it may be nil.
	Lock *os.File
}

// line is how orders are told from those of a shim.
type line struct {
	Task json.RawMessage `json:"task"`
}

// result is what a worker reports.
type result struct {
	ID    string           `json:"id,omitempty"`
	Error *errcode.Failure `json:"error,omitempty"`
}

// Files that a worker inherits: where it reports to, and the lock.
const (
	reportsFD = 3
	lockFD    = 4
)

// Worker is a worker that was started. Its caller calls Wait or Release.
type Worker struct {
	reports *os.File
	exited  func() error
}

// Start starts a worker. It goes on when this process ends.
func Start(opts Options) (*Worker, error) {
	task, err := json.Marshal(opts.Orders)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(line{Task: task})
	if err != nil {
		return nil, err
	}
	log, err := ring.Append(opts.LogPath, ring.LogBytes)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	reports, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = theirs.Close() }()
	orders, ordersWrite, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, reports.Close())
	}
	defer func() { _, _ = orders.Close(), ordersWrite.Close() }()
	program := opts.Program
	cmd := exec.Command(program[0], append(program[1:len(program):len(program)], argument)...) //nolint:noctx // it outlives the call that starts it
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = orders, log, log
	cmd.ExtraFiles = []*os.File{reportsFD - 3: theirs}
	if opts.Lock != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, opts.Lock)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, reports.Close())
	}
	if _, err := ordersWrite.Write(append(text, '\n')); err != nil {
		return nil, errors.Join(err, reports.Close(), cmd.Process.Kill(), cmd.Wait())
	}
	return &Worker{reports: reports, exited: cmd.Wait}, nil
}

// Wait returns the id of what the worker has made. If ctx is done first, the worker goes on:
// somebody else may wait for the same.
func (w *Worker) Wait(ctx context.Context) (id string, err error) {
	stop := context.AfterFunc(ctx, func() { _ = w.reports.Close() })
	defer stop()
	text, err := io.ReadAll(w.reports)
	if ctx.Err() != nil {
		w.Release()
		return "", context.Cause(ctx)
	}
	_ = w.reports.Close()
	if exitErr := w.exited(); err == nil {
		err = exitErr
	}
	var r result
	if json.Unmarshal(text, &r) == nil && r.Error != nil {
		return "", r.Error.Err()
	}
	return r.ID, err
}

// Release lets the worker go on with nobody to wait for it.
func (w *Worker) Release() {
	_ = w.reports.Close()
	go func() { _ = w.exited() }()
}

// Serve makes this process a worker: it reads orders into a value, does the work, which
// returns the id of what it has made, and reports how that went.
func Serve(ctx context.Context, orders io.Reader, into any, work func(context.Context) (id string, err error)) error {
	var read line
	err := json.NewDecoder(orders).Decode(&read)
	if err == nil && read.Task == nil {
		err = errors.New("there is no task among them")
	}
	if err == nil {
		err = json.Unmarshal(read.Task, into)
	}
	if err != nil {
		return fmt.Errorf("read orders: %w", err)
	}
	if err := proc.CloseInherited(lockFD); err != nil {
		return err
	}
	id, err := work(ctx)
	if text, encodeErr := json.Marshal(result{ID: id, Error: errcode.Of(err)}); encodeErr == nil {
		_, _ = os.NewFile(reportsFD, "reports").Write(text) // to nobody, most of the time
	}
	return err
}
