package manager

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/shim"
	shimprocess "github.com/smolvm/smolvm/internal/shim/process"
	"github.com/smolvm/smolvm/internal/vmm"
)

// What a start hands over to the end of the same run; see [shim.Spec].
const (
	handOverDataDir   = "data_dir"
	handOverSocketDir = "socket_dir"
	handOverState     = "state" // of the VM before
)

// newRun makes a name for one run of a VM, by which the end of that run is told
// from the end of any other.
func newRun() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

// ShimOptions are the options of [RunShim].
type ShimOptions struct {
	// Stdin carries the shim's orders from [Manager.Start].
	Stdin io.Reader
	// Backends are what the shim can run VMs by. This is where they are wired in.
	Backends []vmm.Backend
}

// RunShim makes this process the shim of one VM, as ordered by [Manager.Start], and
// returns when the VM has ended and its end is written down; or it makes a template, or
// fills a pool. It is for programs that serve as [Config].ShimCommand.
func RunShim(ctx context.Context, opts ShimOptions) error {
	task, stdin, err := readTask(opts.Stdin)
	if err != nil {
		return fmt.Errorf("read orders: %w", err)
	}
	if task != nil {
		return task.run(ctx, opts.Backends)
	}
	return shimprocess.Main(ctx, shimprocess.Options{
		Stdin:    stdin,
		Backends: opts.Backends,
		Exited:   recordExit,
		Halted:   recordHalt,
	})
}

// recordExit writes down the end of a VM, in the shim's process.
func recordExit(ctx context.Context, record shim.ExitRecord) error {
	return withShimManager(ctx, record.HandOver, func(m *Manager) error { return m.recordExit(ctx, record) })
}

// recordHalt writes down that a VMM has paused its guest, in the shim's process.
func recordHalt(ctx context.Context, record shim.HaltRecord) error {
	return withShimManager(ctx, record.HandOver, func(m *Manager) error {
		began := time.Now()
		changed, err := m.store.MarkHalted(ctx, record.ID, record.Run, record.Cause)
		if changed {
			m.note(ctx, record.ID, "paused", began, record.Cause)
		}
		return err
	})
}

// withShimManager does something with a Manager in the shim's process. The database is
// opened for it only now: a shim has no use for it before.
func withShimManager(ctx context.Context, handOver map[string]string, do func(*Manager) error) error {
	m, err := Open(ctx, Config{
		DataDir:   handOver[handOverDataDir],
		Existing:  true, // it may have been moved or removed meanwhile
		SocketDir: handOver[handOverSocketDir],
		Backend:   "auto",
	})
	if err != nil {
		return err
	}
	m.actor = fmt.Sprintf("shim[%d]", os.Getpid())
	return errors.Join(do(m), m.Close())
}

func (m *Manager) recordExit(ctx context.Context, record shim.ExitRecord) error {
	began := time.Now()
	state := smolvm.StateError
	switch before := smolvm.VMState(record.HandOver[handOverState]); {
	case !record.Committed && before != "":
		state = before // a start that was not confirmed has not been
	case record.Exit.Clean():
		state = smolvm.StateStopped
	}
	cause := record.Exit.String()
	changed, err := m.store.MarkEnded(ctx, record.ID, record.Run, state, cause, record.Exit.At)
	if err != nil {
		return fmt.Errorf("record end of VM %q: %w", record.ID, err)
	}
	if changed {
		m.note(ctx, record.ID, "exit", began, cause)
	}
	return m.eraseEphemeral(ctx, record.ID)
}

// eraseEphemeral deletes an ephemeral VM when it has ended. Whoever holds the VM's
// lock is just stopping or deleting it, and deletes it then; a start that is given
// up leaves it to us.
func (m *Manager) eraseEphemeral(ctx context.Context, id string) error {
	lock, err := m.tryLock(id)
	if errors.Is(err, datadir.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	vm, err := m.store.GetVM(ctx, id)
	switch {
	case errors.Is(err, smolvm.ErrVMNotFound):
		lock.remove()
		return nil
	case err != nil || !vm.Config.Ephemeral || vm.State.Alive():
		lock.unlock()
		return err
	}
	if err := m.erase(ctx, vm); err != nil {
		lock.unlock()
		return fmt.Errorf("delete ephemeral VM %q: %w", id, err)
	}
	lock.remove()
	m.note(ctx, id, "delete", time.Now(), "it is ephemeral")
	return nil
}
