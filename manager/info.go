package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
)

// Get returns what is known of a VM. The error matches [smolvm.ErrVMNotFound] if
// there is none of that id.
func (m *Manager) Get(ctx context.Context, id string) (smolvm.VMInfo, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	info := m.withHealth(ctx, m.info(vm), vm)
	if vm.Run != "" {
		if info.Start, err = m.store.Report(ctx, id); err != nil {
			return smolvm.VMInfo{}, err
		}
	}
	return info, nil
}

// List returns the VMs that the options select, in the order in which they were created.
func (m *Manager) List(ctx context.Context, opts smolvm.ListOptions) ([]smolvm.VMInfo, error) {
	// All of them, as a VM that is found dead changes its state.
	if err := validateList(opts); err != nil {
		return nil, fmt.Errorf("list VMs: %w", err)
	}
	vms, err := m.store.ListVMs(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list VMs: %w", err)
	}
	infos := make([]smolvm.VMInfo, 0, len(vms))
	selected := vms[:0]
	for _, vm := range vms {
		if vm, err = m.settle(ctx, vm); errors.Is(err, smolvm.ErrVMNotFound) {
			continue // it was deleted meanwhile
		} else if err != nil {
			return nil, fmt.Errorf("list VMs: %w", err)
		}
		if selects(opts, vm) {
			infos = append(infos, m.info(vm))
			selected = append(selected, vm)
		}
	}
	m.addHealth(ctx, infos, selected)
	return infos, nil
}

// lookup reads a VM's row and makes it agree with what is so. It is for those who don't
// hold the VM's lock.
func (m *Manager) lookup(ctx context.Context, id string) (store.VM, error) {
	if err := checkID(id); err != nil {
		return store.VM{}, err
	}
	vm, err := m.store.GetVM(ctx, id)
	if err != nil {
		return store.VM{}, err
	}
	return m.settle(ctx, vm)
}

// checkID returns an error for an id that no VM can have. It matches
// [smolvm.ErrVMNotFound], as there is no such VM, and is a [*smolvm.ValidationError].
func checkID(id string) error {
	if err := smolvm.ValidateID(id); err != nil {
		return fmt.Errorf("%w: %w", smolvm.ErrVMNotFound, err)
	}
	return nil
}

// settle finds out whether a VM whose row says that it is alive has died without
// anybody to write it down. A shim writes down its VM's end, so that takes the
// death of the shim itself, or of the host. A VM that somebody else is changing is left
// to that one, and what can't be written down is reported all the same.
func (m *Manager) settle(ctx context.Context, vm store.VM) (store.VM, error) {
	if !m.isLost(vm) {
		return vm, nil
	}
	lock, err := m.tryLock(vm.ID)
	if errors.Is(err, datadir.ErrLocked) {
		return vm, nil
	}
	if err != nil {
		return lost(vm), nil
	}
	now, err := m.store.GetVM(ctx, vm.ID) // as it is now, with the lock
	if errors.Is(err, smolvm.ErrVMNotFound) {
		lock.remove()
		return vm, err
	}
	defer lock.unlock()
	if err == nil {
		now, err = m.settleLocked(ctx, now, lookTime)
	}
	switch {
	case ctx.Err() != nil:
		return vm, context.Cause(ctx)
	case err != nil:
		return lost(vm), nil
	}
	return now, nil
}

// settleLocked is settle for the holder of the VM's lock. Limit is how long processes that
// have to be killed may take.
func (m *Manager) settleLocked(ctx context.Context, vm store.VM, limit time.Duration) (store.VM, error) {
	if !m.isLost(vm) {
		return vm, nil
	}
	if err := m.recordDeadShim(ctx, vm, limit); err != nil {
		return vm, err
	}
	return m.store.GetVM(ctx, vm.ID)
}

// lost is a VM whose shim died as it would be after that has been written down.
func lost(vm store.VM) store.VM {
	vm.State, vm.Cause = smolvm.StateError, causeShimDied
	return vm
}

// isLost reports whether a VM is alive by its row, and its shim is not.
func (m *Manager) isLost(vm store.VM) bool { return vm.State.Alive() && !m.shimAlive(vm) }

func (m *Manager) shimAlive(vm store.VM) bool {
	return vm.BootID == m.bootID() && proc.Alive(vm.ShimPID, vm.ShimStart)
}

// info is what callers get to see of a row.
func (m *Manager) info(vm store.VM) smolvm.VMInfo {
	// A VM that this build can't connect is shown without addresses; its start is refused.
	at, _ := machine.Addresses(vm)
	plan := at.Public()
	plan.Bridge = vm.Config.Network.Bridge
	plan.SSHHostAddr = vm.Config.SSHHostAddr
	plan.SSHHostPort = vm.SSHPort
	plan.PortForwards = vm.Forwards
	info := smolvm.VMInfo{
		ID:      vm.ID,
		State:   vm.State,
		Config:  vm.Config,
		Network: plan,

		EgressRevision: vm.EgressRevision,

		Image:       vm.Image,
		Backend:     vm.Backend,
		Accelerator: vm.Accelerator,
		HostInfo:    smolvm.HostInfo{DiskPath: vm.DiskPath, LogPath: vm.LogPath},
		Cause:       vm.Cause,
		CreatedAt:   vm.CreatedAt,
		StartedAt:   vm.StartedAt,
		StoppedAt:   vm.StoppedAt,
	}
	if vm.State.Alive() {
		info.PID, info.ShimPID = vm.PID, vm.ShimPID
		info.SocketPath = shim.ControlSocket(m.runtimeDir(vm.ID))
	}
	return info
}

// vmError returns an error of an operation on a VM; nil for nil.
func vmError(op, id string, err error) error {
	if err == nil {
		return nil
	}
	return &smolvm.Error{Op: op, Kind: "VM", ID: id, Err: err}
}

// stateError says that a verb does not fit the VM's state, and what would.
func stateError(verb string, vm store.VM) error {
	var next string
	switch vm.State {
	case smolvm.StateCreated, smolvm.StateStopped:
		next = "start it first"
	case smolvm.StateRunning:
		next = "stop it first"
	case smolvm.StatePaused:
		next = "resume or stop it first"
		if vm.Cause != "" {
			next = fmt.Sprintf("%s; resume it when that is fixed, or stop it", vm.Cause)
		}
	case smolvm.StateError:
		next = fmt.Sprintf("it failed (%s); start it again, which boots it from its disk, or delete it", vm.Cause)
	}
	return vmError(verb, vm.ID, fmt.Errorf("%w: it is %s; %s", smolvm.ErrInvalidState, vm.State, next))
}
