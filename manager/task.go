package manager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/template"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/traits"
	"github.com/smolvm/smolvm/internal/worker"
)

// task is what a worker is to do: to make a template, or to fill a pool; see package worker.
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
	Kind   template.Kind   `json:"recipe"`
	Config smolvm.VMConfig `json:"config"`
	// Timeout is how long the VM may take to be ready. Zero: as long as others.
	Timeout time.Duration `json:"timeout_ns,omitempty"`
}

// startTask starts a worker, which goes on when ctx is done. Lock, if not nil, is the worker's
// from then on.
func (m *Manager) startTask(ctx context.Context, t task, lock *os.File) (*worker.Worker, error) {
	program, err := m.shimCommand()
	if err != nil {
		return nil, err
	}
	t.DataDir, t.SocketDir, t.Backend, t.Shim, t.MaxBytes = m.dataDir, m.socketDir, m.backend, program, m.config.templateBytes()
	t.DiskBudget, t.DiskReserve = m.budget.Limits.Bytes, m.budget.Limits.Reserve
	return worker.Start(ctx, worker.Options{Program: program, Orders: t, LogPath: m.workerLog(), Hint: shim.NoShimHint, Lock: lock})
}

// runTask has a worker do a task, and returns what it has made. If ctx is done first, the
// worker goes on: somebody else may wait for it.
func (m *Manager) runTask(ctx context.Context, t task, lock *os.File) (id string, err error) {
	w, err := m.startTask(ctx, t, lock)
	if err != nil {
		return "", err
	}
	return w.Wait(ctx)
}

// startTaskAside has a worker do a task that nobody waits for. That it can't be started only
// makes the next start slower.
func (m *Manager) startTaskAside(t task, lock *os.File) error {
	w, err := m.startTask(context.Background(), t, lock)
	if err == nil {
		w.Release()
	}
	return err
}

// background has the next start of a kind prepared; it implements [start.Background].
type background struct{ *Manager }

// FillPool implements [start.Background].
func (b background) FillPool(key string) error { return b.startTaskAside(task{Pool: key}, nil) }

// BuildTemplate implements [start.Background].
func (b background) BuildTemplate(kind template.Kind, config smolvm.VMConfig, lock *os.File) error {
	return b.startTaskAside(task{Template: &templateTask{Kind: kind, Config: config}}, lock)
}

// workerLog is what workers, and the shims that they start, have to say.
func (m *Manager) workerLog() string { return filepath.Join(m.dir.Cache(), "tasks.log") }

// RunWorker makes this process do in the background what a Manager has ordered on its
// standard input: make a template, or fill a pool. It is for package shim of this module,
// which programs that serve as shims use.
//
// The traits are those of backends that declare them by themselves, and take the place of what
// is known of backends of those names.
func RunWorker(ctx context.Context, orders io.Reader, declared ...vmm.Traits) error {
	var t task
	return worker.Serve(ctx, orders, &t, func(ctx context.Context) (string, error) { return t.run(ctx, traits.All().With(declared...)) })
}

// run does the task.
func (t *task) run(ctx context.Context, known traits.List) (id string, err error) {
	m, err := open(ctx, Config{
		Existing: true, // it may have been removed since
		DataDir:  t.DataDir, SocketDir: t.SocketDir, Backend: t.Backend, ShimCommand: t.Shim,
		Templates: TemplateConfig{MaxBytes: t.MaxBytes}, DiskBudget: t.DiskBudget, DiskReserve: t.DiskReserve,
		backends: known,
	})
	if err != nil {
		return "", err
	}
	m.actor = fmt.Sprintf("task[%d]", os.Getpid())
	switch {
	case t.Template != nil:
		id, err = m.templates.Build(ctx, t.Template.Kind, t.Template.Config, t.Template.Timeout)
	case t.Pool != "":
		err = m.pools.Fill(ctx, t.Pool)
	default:
		err = errors.New("the orders have no task that this program knows")
	}
	return id, errors.Join(err, m.Close())
}
