package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
)

// AddPortForward forwards a host port to the guest, at once if the VM runs, and at
// each of its starts. What is returned names the host port that was chosen, if the
// caller left that open. The error is a [*smolvm.NetworkError], and matches
// [smolvm.ErrPortInUse] if another VM or program has the port.
func (m *Manager) AddPortForward(ctx context.Context, id string, forward smolvm.PortForward) (smolvm.PortForward, error) {
	began := time.Now()
	forward = forward.WithDefaults()
	if err := forward.Validate(); err != nil {
		return forward, err
	}
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return forward, err
	}
	defer lock.unlock()
	fail := func(err error) (smolvm.PortForward, error) {
		return forward, &smolvm.NetworkError{ID: id, Op: "forward " + forward.String(), Err: err}
	}
	if err := noForwards(vm); err != nil {
		return fail(err)
	}
	// The row comes first: it keeps other VMs off the port.
	forward, err = m.store.Ports().AddForward(ctx, id, forward, shim.PortFree)
	if err != nil {
		return fail(err)
	}
	step.Reached(ctx, "port add/row")
	if vm.State.Alive() {
		_, err := shim.NewClient(m.runtimeDir(id)).AddForward(ctx, shim.ForwardOf(forward))
		if err != nil {
			_ = m.store.Ports().RemoveForward(context.WithoutCancel(ctx), id, forward.Protocol, forward.HostPort)
			return fail(err)
		}
		step.Reached(ctx, "port add/forwarded")
	}
	m.note(ctx, id, "port-add", began, forward.String())
	return forward, nil
}

// RemovePortForward ends the forward of a host port, with its connections. Of the forward
// that is given only the host port and the protocol matter.
func (m *Manager) RemovePortForward(ctx context.Context, id string, forward smolvm.PortForward) error {
	began := time.Now()
	forward = forward.WithDefaults()
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return err
	}
	defer lock.unlock()
	i := slices.IndexFunc(vm.Forwards, func(f smolvm.PortForward) bool {
		return f.HostPort == forward.HostPort && f.Protocol == forward.Protocol
	})
	if i < 0 {
		return &smolvm.NetworkError{ID: id, Op: "remove port forward", Err: &smolvm.Error{
			Hint: fmt.Sprintf("`smolvm port ls %s` lists the VM's forwards", id),
			Err:  fmt.Errorf("host port %d/%s: %w", forward.HostPort, forward.Protocol, smolvm.ErrNotFound),
		}}
	}
	// The row goes last: as long as the port is held it belongs to this VM.
	if vm.State.Alive() {
		err := shim.NewClient(m.runtimeDir(id)).RemoveForward(ctx, shim.ForwardOf(vm.Forwards[i]))
		// A process that was killed between the two has left only the row.
		if err != nil && !errors.Is(err, smolvm.ErrNotFound) {
			return &smolvm.NetworkError{ID: id, Op: "remove port forward", Err: err}
		}
		step.Reached(ctx, "port rm/ended")
	}
	if err := m.store.Ports().RemoveForward(ctx, id, forward.Protocol, forward.HostPort); err != nil {
		return &smolvm.NetworkError{ID: id, Op: "remove port forward", Err: err}
	}
	step.Reached(ctx, "port rm/row")
	m.note(ctx, id, "port-rm", began, vm.Forwards[i].String())
	return nil
}

// PortForwards lists the VM's forwards, without that of SSH.
func (m *Manager) PortForwards(ctx context.Context, id string) ([]smolvm.PortForward, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return nil, err
	}
	if vm.Forwards == nil {
		return []smolvm.PortForward{}, nil
	}
	return vm.Forwards, nil
}
