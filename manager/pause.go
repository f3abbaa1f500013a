package manager

import (
	"context"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
)

// Pause holds a running VM: its CPUs stop, its memory stays. Connections to it wait.
func (m *Manager) Pause(ctx context.Context, id string) (smolvm.VMInfo, error) {
	return m.hold(ctx, id, "pause", smolvm.StateRunning, smolvm.StatePaused, (*shim.Client).Pause)
}

// Resume lets a paused VM go on, and sets its clock.
func (m *Manager) Resume(ctx context.Context, id string) (smolvm.VMInfo, error) {
	return m.hold(ctx, id, "resume", smolvm.StatePaused, smolvm.StateRunning, (*shim.Client).Resume)
}

func (m *Manager) hold(ctx context.Context, id, verb string, from, to smolvm.VMState, do func(*shim.Client, context.Context) error) (smolvm.VMInfo, error) {
	began := time.Now()
	lock, err := m.lockExisting(ctx, id)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	defer lock.unlock()
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	if vm.State != from {
		return smolvm.VMInfo{}, stateError(verb, vm)
	}
	if err := do(shim.NewClient(m.runtimeDir(id)), ctx); err != nil {
		return smolvm.VMInfo{}, fmt.Errorf("%s VM %q: %w", verb, id, err)
	}
	if err := m.store.SetState(context.WithoutCancel(ctx), id, []smolvm.VMState{from}, to); err != nil {
		return smolvm.VMInfo{}, fmt.Errorf("%s VM %q: %w", verb, id, err)
	}
	m.note(ctx, id, verb, began, "")
	vm.State = to
	return m.info(vm), nil
}
