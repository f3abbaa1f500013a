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

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/errcode"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
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

// taskResult is what it reports.
type taskResult struct {
	ID    string           `json:"id,omitempty"`
	Error *errcode.Failure `json:"error,omitempty"`
}

// Files that a task inherits: where it reports to, and a lock that it holds as long as
// it lives.
const (
	taskReportsFD = 3
	taskLockFD    = 4
)

// startTask starts a task. Lock, if not nil, is the task's from then on.
func (m *Manager) startTask(t task, lock *os.File) (reports *os.File, wait func() error, err error) {
	program, err := m.shimCommand()
	if err != nil {
		return nil, nil, err
	}
	t.DataDir, t.SocketDir, t.Backend, t.Shim, t.MaxBytes = m.dataDir, m.socketDir, m.backend, program, m.config.templateBytes()
	t.DiskBudget, t.DiskReserve = m.diskBudget, m.diskReserve
	text, err := json.Marshal(taskOrders{Task: &t})
	if err != nil {
		return nil, nil, err
	}
	log, err := ring.Append(m.workerLog(), ring.LogBytes)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = log.Close() }()
	reports, theirs, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = theirs.Close() }()
	orders, ordersWrite, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, reports.Close())
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
		return nil, nil, errors.Join(err, reports.Close())
	}
	if _, err := ordersWrite.Write(append(text, '\n')); err != nil {
		return nil, nil, errors.Join(err, reports.Close(), cmd.Process.Kill(), cmd.Wait())
	}
	return reports, cmd.Wait, nil
}

// runTask runs a task and returns what it has made. If ctx is done first, the task goes
// on: somebody else may wait for it.
func (m *Manager) runTask(ctx context.Context, t task, lock *os.File) (id string, err error) {
	reports, wait, err := m.startTask(t, lock)
	if err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { _ = reports.Close() })
	defer stop()
	var result taskResult
	text, err := io.ReadAll(reports)
	if ctx.Err() != nil {
		go func() { _ = wait() }()
		return "", context.Cause(ctx)
	}
	_ = reports.Close()
	if waitErr := wait(); err == nil {
		err = waitErr
	}
	if json.Unmarshal(text, &result) == nil && result.Error != nil {
		return "", result.Error.Err()
	}
	return result.ID, err
}

// workerLog is what workers, and the shims that they start, have to say.
func (m *Manager) workerLog() string { return filepath.Join(m.dir.Cache(), "tasks.log") }

// startTaskAside starts a task that nobody waits for. That it can't be started only
// makes the next start slower.
func (m *Manager) startTaskAside(t task, lock *os.File) error {
	reports, wait, err := m.startTask(t, lock)
	if err != nil {
		return err
	}
	_ = reports.Close()
	go func() { _ = wait() }()
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
	m, err := open(ctx, Config{
		DataDir: t.DataDir, SocketDir: t.SocketDir, Backend: t.Backend, ShimCommand: t.Shim,
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
		_, _ = os.NewFile(taskReportsFD, "reports").Write(text) // to nobody, most of the time
	}
	return err
}
