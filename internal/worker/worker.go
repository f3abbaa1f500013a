// Package worker has work done in a process of its own, which is the program that serves as
// shim: it goes on when the process that wanted it is over.
//
// A worker reads its orders, a line of JSON, on its standard input, and reports what it has
// made, or why it could not, on a pipe that it inherits. It knows neither templates nor pools:
// what the orders mean is its user's.
package worker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/smolvm/smolvm"
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
	// Hint is what to do about a program that does not answer as a worker.
	Hint string
	// Lock is the worker's from then on, as long as it lives; it may be nil.
	Lock *os.File

	limit time.Duration // zero: answerTime
}

// line is the line of orders, by which they are told from those of a shim.
type line struct {
	// ReportStart has the worker report that it has begun; see [report].
	ReportStart bool            `json:"report_start,omitempty"`
	Task        json.RawMessage `json:"task"`
}

// report is what a worker reports: first that it has begun, if it was asked to, and then how
// its work went.
type report struct {
	Started bool             `json:"started,omitempty"`
	ID      string           `json:"id,omitempty"`
	Error   *errcode.Failure `json:"error,omitempty"`
}

// answerTime is how long a worker may take to report that it has begun. That is done in
// milliseconds, on a busy host in seconds.
const answerTime = time.Minute

// Files that a worker inherits: where it reports to, and the lock.
const (
	reportsFD = 3
	lockFD    = 4
)

// Worker is a worker that was started. Its caller calls Wait or Release.
type Worker struct {
	cmd     *exec.Cmd
	reports *os.File
	// limit is how long it may take to report that it has begun.
	limit time.Duration
	hint  string
}

// Start starts a worker, which goes on when ctx is done, and when this process ends.
func Start(ctx context.Context, opts Options) (*Worker, error) {
	task, err := json.Marshal(opts.Orders)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(line{Task: task, ReportStart: true})
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
	w := &Worker{cmd: cmd, reports: reports, limit: cmp.Or(opts.limit, answerTime), hint: opts.Hint}
	_ = ordersWrite.SetWriteDeadline(time.Now().Add(w.limit))
	stop := context.AfterFunc(ctx, func() { _ = ordersWrite.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := ordersWrite.Write(append(text, '\n')); err != nil {
		err = w.silent(err)
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	return w, nil
}

// Wait returns the id of what the worker has made. If ctx is done first, the worker goes on:
// somebody else may wait for the same.
func (w *Worker) Wait(ctx context.Context) (id string, err error) {
	ended := make(chan struct{})
	var got report
	var failure error
	go func() {
		defer close(ended)
		got, failure = w.result()
	}()
	select {
	case <-ended:
		return got.ID, failure
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// Release lets the worker go on with nobody to wait for it.
func (w *Worker) Release() {
	go func() { _, _ = w.result() }()
}

// result returns what the worker reports when its work is over, and it has ended. A worker that
// has not begun in time is killed, and so is one that goes on for as long after its report.
func (w *Worker) result() (report, error) {
	_ = w.reports.SetReadDeadline(time.Now().Add(w.limit))
	decoder := json.NewDecoder(w.reports)
	var got report
	err := decoder.Decode(&got)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return report{}, w.silent(fmt.Errorf("no answer within %s", w.limit))
	}
	if err == nil && got.Started {
		_ = w.reports.SetReadDeadline(time.Time{})
		got = report{}
		err = decoder.Decode(&got)
	}
	_ = w.reports.Close()
	kill := time.AfterFunc(w.limit, func() { _ = w.cmd.Process.Kill() })
	defer kill.Stop()
	switch exitErr := w.cmd.Wait(); {
	case err == nil && got.Error != nil:
		err = got.Error.Err()
	case exitErr != nil:
		err = fmt.Errorf("%s as a worker: %w", w.cmd.Path, exitErr)
	case err != nil:
		err = w.noWorker(fmt.Errorf("it ended without a report (%w)", err))
	}
	return got, err
}

// silent kills a worker that does not do what workers do, and returns the error of that.
func (w *Worker) silent(why error) error {
	_, _, _ = w.reports.Close(), w.cmd.Process.Kill(), w.cmd.Wait()
	return w.noWorker(why)
}

func (w *Worker) noWorker(why error) error {
	return &smolvm.Error{Hint: w.hint, Err: fmt.Errorf("the program %q did not answer as a worker: %w", w.cmd.Args, why)}
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
	reports := os.NewFile(reportsFD, "reports")
	if read.ReportStart {
		_ = json.NewEncoder(reports).Encode(report{Started: true}) // to nobody, if its starter is gone
	}
	id, err := work(ctx)
	if text, encodeErr := json.Marshal(report{ID: id, Error: errcode.Of(err)}); encodeErr == nil {
		_, _ = reports.Write(text)
	}
	return err
}
