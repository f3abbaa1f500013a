package manager

import (
	"context"
	"errors"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
)

// holdTime bounds how long a shim may take to hold its guest, or to let it go on.
const holdTime = 30 * time.Second

// Pause holds a running VM: its CPUs stop, its memory stays. Connections to it wait.
func (m *Manager) Pause(ctx context.Context, id string) (smolvm.VMInfo, error) {
	return m.hold(ctx, id, "pause", smolvm.StateRunning, func(ctx context.Context, client *shim.Client) error {
		// Written down first: should this process die in between, the VM is said to be
		// paused, and resuming one that runs does no harm.
		if err := m.store.SetState(ctx, id, []smolvm.VMState{smolvm.StateRunning}, smolvm.StatePaused); err != nil {
			return err
		}
		err := client.Pause(ctx)
		if err != nil && ctx.Err() == nil { // else it may be paused yet
			err = errors.Join(err, m.store.SetState(ctx, id, []smolvm.VMState{smolvm.StatePaused}, smolvm.StateRunning))
		}
		return err
	})
}

// Resume lets a paused VM go on, and sets its clock. So does it with a VM that was paused by
// its VMM, as the host's disk is full; [smolvm.VMInfo].Cause tells. If that is so still, the
// VM stays paused and the error says why.
func (m *Manager) Resume(ctx context.Context, id string) (smolvm.VMInfo, error) {
	return m.hold(ctx, id, "resume", smolvm.StatePaused, func(ctx context.Context, client *shim.Client) error {
		if err := client.Resume(ctx); err != nil {
			return err
		}
		if err := m.store.SetState(ctx, id, []smolvm.VMState{smolvm.StatePaused}, smolvm.StateRunning); err != nil {
			return err
		}
		// It may have been paused again before that was written.
		status, err := client.Status(ctx)
		if err == nil && status.Halt != "" {
			_, err = m.store.MarkCause(ctx, id, status.Run, smolvm.StatePaused, status.Halt)
		}
		return err
	})
}

// hold holds a VM, or lets it go on. Once that has begun it is not given up.
func (m *Manager) hold(ctx context.Context, id, verb string, from smolvm.VMState, do func(context.Context, *shim.Client) error) (smolvm.VMInfo, error) {
	began := time.Now()
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	defer lock.unlock()
	if vm.State != from {
		return smolvm.VMInfo{}, stateError(verb, vm)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), holdTime)
	defer cancel()
	if err := do(ctx, shim.NewClient(m.runtimeDir(id))); err != nil {
		return smolvm.VMInfo{}, vmError(verb, id, err)
	}
	step.Reached(ctx, verb+"/done")
	m.note(ctx, id, verb, began, "")
	if vm, err = m.store.GetVM(ctx, id); err != nil {
		return smolvm.VMInfo{}, err
	}
	return m.info(vm), nil
}
