package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/errcode"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/shim"
)

// task is work for a process of its own, which is the program that serves as shim: it
// goes on when this process is over, and it has the backends.
type task struct {
	DataDir   string   `json:"data_dir"`
	SocketDir string   `json:"socket_dir"`
	Backend   string   `json:"backend"`
	Shim      []string `json:"shim"`
	MaxBytes  int64    `json:"max_bytes"`
	// Those of [Config].
	DiskBudget  int64 `json:"disk_budget,omitempty"`
	DiskReserve int64 `json:"disk_reserve,omitempty"`

	// ReportStart has the worker report that it has begun; see [taskResult].
	ReportStart bool `json:"report_start,omitempty"`

	Template *templateTask `json:"template,omitempty"`
	// Pool is the id of a pool to be filled.
	Pool string `json:"pool,omitempty"`
}

type templateTask struct {
	Recipe recipe          `json:"recipe"`
	Config smolvm.VMConfig `json:"config"`
}

// taskOrders is what the program reads first, if it is not to be a shim.
type taskOrders struct {
	Task *task `json:"task"`
}

// taskResult is what it reports: first that it has begun, if it was asked to, and then how
// the task went.
type taskResult struct {
	Started bool             `json:"started,omitempty"`
	ID      string           `json:"id,omitempty"`
	Error   *errcode.Failure `json:"error,omitempty"`
}

// workerAnswerTime is how long a worker may take to report that it has begun. That is done in
// milliseconds, on a busy host in seconds.
const workerAnswerTime = time.Minute

// Files that a task inherits: where it reports to, and a lock that it holds as long as
// it lives.
const (
	taskReportsFD = 3
	taskLockFD    = 4
)

// worker is the process of a task.
type worker struct {
	cmd     *exec.Cmd
	reports *os.File
}

// startTask starts a task, which goes on when ctx is done. Lock, if not nil, is the task's from
// then on.
func (m *Manager) startTask(ctx context.Context, t task, lock *os.File) (*worker, error) {
	program, err := m.shimCommand()
	if err != nil {
		return nil, err
	}
	t.DataDir, t.SocketDir, t.Backend, t.Shim, t.MaxBytes = m.dataDir, m.socketDir, m.backend.Name, program, m.config.templateBytes()
	t.DiskBudget, t.DiskReserve, t.ReportStart = m.diskBudget, m.diskReserve, true
	text, err := json.Marshal(taskOrders{Task: &t})
	if err != nil {
		return nil, err
	}
	log, err := ring.Append(m.workerLog(), ring.LogBytes)
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
	cmd := exec.Command(program[0], append(program[1:len(program):len(program)], "task")...) //nolint:noctx // it outlives the call that starts it
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = orders, log, log
	cmd.ExtraFiles = []*os.File{taskReportsFD - 3: theirs}
	if lock != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, lock)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, reports.Close())
	}
	w := &worker{cmd: cmd, reports: reports}
	_ = ordersWrite.SetWriteDeadline(time.Now().Add(workerAnswerTime))
	stop := context.AfterFunc(ctx, func() { _ = ordersWrite.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := ordersWrite.Write(append(text, '\n')); err != nil {
		return nil, w.silent(err)
	}
	return w, nil
}

// result returns what the worker reports when its task is over, and has ended. A worker that
// has not begun in the time that is given is killed, and so is one that goes on for as long
// after its report.
func (w *worker) result(limit time.Duration) (taskResult, error) {
	_ = w.reports.SetReadDeadline(time.Now().Add(limit))
	decoder := json.NewDecoder(w.reports)
	var got taskResult
	err := decoder.Decode(&got)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return taskResult{}, w.silent(fmt.Errorf("no answer within %s", limit))
	}
	if err == nil && got.Started {
		_ = w.reports.SetReadDeadline(time.Time{})
		got = taskResult{}
		err = decoder.Decode(&got)
	}
	_ = w.reports.Close()
	kill := time.AfterFunc(limit, func() { _ = w.cmd.Process.Kill() })
	defer kill.Stop()
	switch waitErr := w.cmd.Wait(); {
	case err == nil && got.Error != nil:
		err = got.Error.Err()
	case waitErr != nil:
		err = fmt.Errorf("%s as a worker: %w", w.cmd.Path, waitErr)
	case err != nil:
		err = w.noWorker(fmt.Errorf("it ended without a report (%w)", err))
	}
	return got, err
}

// silent kills a worker that does not do what workers do, and returns the error of that.
func (w *worker) silent(why error) error {
	_, _, _ = w.reports.Close(), w.cmd.Process.Kill(), w.cmd.Wait()
	return w.noWorker(why)
}

func (w *worker) noWorker(why error) error {
	return &smolvm.Error{Hint: shim.NoShimHint, Err: fmt.Errorf("the program %q did not answer as a worker: %w", w.cmd.Args, why)}
}

// runTask runs a task and returns what it has made. If ctx is done first, the task goes
// on: somebody else may wait for it.
func (m *Manager) runTask(ctx context.Context, t task, lock *os.File) (string, error) {
	w, err := m.startTask(ctx, t, lock)
	if ctx.Err() != nil && err != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		return "", err
	}
	ended := make(chan struct{})
	var result taskResult
	var failure error
	go func() {
		defer close(ended)
		result, failure = w.result(workerAnswerTime)
	}()
	select {
	case <-ended:
		return result.ID, failure
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// workerLog is what workers, and the shims that they start, have to say.
func (m *Manager) workerLog() string { return filepath.Join(m.dir.Cache(), "tasks.log") }

// startTaskAside starts a task that nobody waits for. That it can't be started only
// makes the next start slower.
func (m *Manager) startTaskAside(t task, lock *os.File) error {
	w, err := m.startTask(context.Background(), t, lock)
	if err != nil {
		return err
	}
	go func() { _, _ = w.result(workerAnswerTime) }()
	return nil
}

// RunWorker makes this process do in the background what a Manager has ordered on its
// standard input: make a template, or fill a pool. It is for package shim of this module,
// which programs that serve as shims use.
func RunWorker(ctx context.Context, orders io.Reader) error {
	var read taskOrders
	err := json.NewDecoder(orders).Decode(&read)
	if err == nil && (read.Task == nil || read.Task.Template == nil && read.Task.Pool == "") {
		err = errors.New("there is no task among them")
	}
	if err != nil {
		return fmt.Errorf("read orders: %w", err)
	}
	return read.Task.run(ctx)
}

// run is the life of a task.
func (t task) run(ctx context.Context) error {
	if err := proc.CloseInherited(taskLockFD); err != nil {
		return err
	}
	reports := os.NewFile(taskReportsFD, "reports")
	if t.ReportStart {
		_ = json.NewEncoder(reports).Encode(taskResult{Started: true}) // to nobody, if the Manager is gone
	}
	m, err := open(ctx, Config{
		Existing: true, // it may have been removed since
		DataDir:  t.DataDir, SocketDir: t.SocketDir, Backend: t.Backend, ShimCommand: t.Shim,
		Templates: TemplateConfig{MaxBytes: t.MaxBytes}, DiskBudget: t.DiskBudget, DiskReserve: t.DiskReserve,
	})
	var result taskResult
	if err == nil {
		m.actor = fmt.Sprintf("task[%d]", os.Getpid())
		switch {
		case t.Template != nil:
			result.ID, err = m.buildTemplate(ctx, t.Template.Recipe, t.Template.Config)
		case t.Pool != "":
			err = m.fillPool(ctx, t.Pool)
		}
		err = errors.Join(err, m.Close())
	}
	result.Error = errcode.Of(err)
	if text, err := json.Marshal(result); err == nil {
		_, _ = reports.Write(text)
	}
	return err
}
