package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociconfig"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
)

// Times of the manager's side of an end. The shim ends its VM within the grace and
// little more by itself; these are for a shim that does not.
const (
	// hungTime is how long after the grace a shim is killed that has answered nothing.
	hungTime = 800 * time.Millisecond
	// lateTime is how long after the grace a shim is killed that does answer, but has
	// not ended its VM.
	lateTime = 5 * time.Second
	// lookTime is [proc.KillTime] of somebody who only wants to look at a VM.
	lookTime = 200 * time.Millisecond
	// lockTime is how long after the grace another operation on a VM is waited for
	// before it is cut short by ending the VM.
	lockTime = 2 * time.Second
)

// Stop shuts a VM down: by asking its agent, then its power button, then by ending
// the VMM, all within the timeout. Stopping a VM that does not run does nothing and
// is no error. Stopping an ephemeral VM also deletes it; Stop then returns its final
// state.
func (m *Manager) Stop(ctx context.Context, id string, opts smolvm.StopOptions) (smolvm.VMInfo, error) {
	began := time.Now()
	how := stopOf(opts)
	vm, lock, err := m.lockToEnd(ctx, id, how)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	vm, err = m.settleLocked(ctx, vm, proc.KillTime)
	if err != nil || !vm.State.Alive() {
		lock.unlock()
		return m.info(vm), err
	}
	how.Signal, _ = ociconfig.ParseSignal(vm.Config.StopSignal) // it was checked
	vm, err = m.endLocked(ctx, vm, how)
	if err == nil && vm.Config.Ephemeral {
		err = m.erase(ctx, vm)
	}
	if err == nil && vm.Config.Ephemeral {
		lock.remove()
	} else {
		lock.unlock()
	}
	if err != nil {
		return smolvm.VMInfo{}, fmt.Errorf("stop VM %q: %w", id, err)
	}
	m.note(ctx, id, "stop", began, "")
	return m.info(vm), nil
}

// stopOf returns what a shim is told of the options of a stop.
func stopOf(o smolvm.StopOptions) shim.Stop {
	switch {
	case o.Kill || o.Timeout < 0:
		return shim.Stop{}
	case o.Timeout == 0:
		return shim.Stop{Grace: smolvm.DefaultStopTimeout}
	}
	return shim.Stop{Grace: o.Timeout, Patient: true}
}

// Delete stops a VM and removes all that belongs to it: disk, logs, leases. With
// RetainDisk the disk stays, and the VM is shut down in an orderly way first;
// otherwise nothing of it is worth the wait.
func (m *Manager) Delete(ctx context.Context, id string, opts smolvm.DeleteOptions) error {
	began := time.Now()
	how := deletionOf(opts)
	vm, lock, err := m.lockToEnd(ctx, id, how)
	if err != nil {
		return err
	}
	if vm.State.Alive() {
		if vm.Config.RetainDisk && opts.Timeout == 0 {
			how = stopOf(smolvm.StopOptions{})
		}
		// That is not written down: the row goes, and on a full disk there is no room
		// for it before the files are gone.
		err = m.endProcesses(ctx, vm, how)
	}
	if err == nil {
		err = m.erase(ctx, vm)
	}
	if err != nil {
		lock.unlock()
		if errors.Is(err, smolvm.ErrVMNotFound) {
			return err
		}
		return fmt.Errorf("delete VM %q: %w", id, err)
	}
	left := m.eraseNetwork(ctx, vm)
	lock.remove()
	m.dir.KeepReserve()
	m.note(ctx, id, "delete", began, "")
	return left
}

// deletionOf returns what a shim is told of the options of a deletion.
func deletionOf(o smolvm.DeleteOptions) shim.Stop {
	if o.Timeout <= 0 {
		return shim.Stop{}
	}
	return stopOf(smolvm.StopOptions{Timeout: o.Timeout})
}

// lockToEnd is lockExisting for a VM that is to be ended. Another operation on it that
// takes too long is cut short: without its VM it fails.
func (m *Manager) lockToEnd(ctx context.Context, id string, how shim.Stop) (store.VM, *vmLock, error) {
	bounded, cancel := context.WithTimeout(ctx, how.Grace+lockTime)
	vm, lock, err := m.lockExisting(bounded, id)
	cancel()
	if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return vm, lock, err
	}
	vm, err = m.store.GetVM(ctx, id)
	if err == nil && vm.State.Alive() {
		err = m.endProcesses(ctx, vm, shim.Stop{})
	}
	if err != nil {
		return store.VM{}, nil, err
	}
	return m.lockExisting(ctx, id)
}

// lockExisting is lock for a VM that must be there, so that no lock is made for
// one that is not. The row is as it is with the lock.
func (m *Manager) lockExisting(ctx context.Context, id string) (store.VM, *vmLock, error) {
	if err := checkID(id); err != nil {
		return store.VM{}, nil, err
	}
	if _, err := m.store.GetVM(ctx, id); err != nil {
		return store.VM{}, nil, err
	}
	lock, err := m.lock(ctx, id)
	if err != nil {
		return store.VM{}, nil, err
	}
	// It may have been deleted while we waited.
	vm, err := m.store.GetVM(ctx, id)
	if err != nil {
		if errors.Is(err, smolvm.ErrVMNotFound) {
			lock.remove()
		} else {
			lock.unlock()
		}
		return store.VM{}, nil, err
	}
	return vm, lock, nil
}

// acquire locks a VM that must be there, and reads its row as it is then, with its end if it
// has died. The lock is the caller's.
func (m *Manager) acquire(ctx context.Context, id string) (store.VM, *vmLock, error) {
	vm, lock, err := m.lockExisting(ctx, id)
	if err != nil {
		return store.VM{}, nil, err
	}
	if vm, err = m.settleLocked(ctx, vm, proc.KillTime); err != nil {
		lock.unlock()
		return store.VM{}, nil, err
	}
	return vm, lock, nil
}

// endLocked ends a living VM, and returns when its shim is gone and its end is written
// down.
func (m *Manager) endLocked(ctx context.Context, vm store.VM, how shim.Stop) (store.VM, error) {
	if err := m.endProcesses(ctx, vm, how); err != nil {
		return vm, err
	}
	step.Reached(ctx, "stop/ended")
	if _, err := m.store.MarkEnded(ctx, vm.ID, vm.Run, smolvm.StateStopped, "stopped by request", time.Now().UTC()); err != nil {
		return vm, fmt.Errorf("it has ended, but that can't be written down: %w", err)
	}
	step.Reached(ctx, "stop/written")
	if err := shim.RemoveRuntimeDir(m.runtimeDir(vm.ID)); err != nil {
		return vm, err
	}
	return m.store.GetVM(ctx, vm.ID)
}

// errShimHangs is why a shim is killed.
var errShimHangs = errors.New("the VM's shim does not answer")

// endProcesses ends the shim and the VMM of a living VM. The shim does that in an orderly
// way, and writes it down; if it does not in time, both are killed.
func (m *Manager) endProcesses(ctx context.Context, vm store.VM, how shim.Stop) error {
	if how.Grace > 0 {
		// Commands that this process runs in the guest get the signal, and time to end:
		// without their client they would be killed.
		defer m.forgetClient(vm.ID)
	} else {
		m.forgetClient(vm.ID)
	}
	bounded, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	give := func() { cancel(errShimHangs) }
	late := time.AfterFunc(how.Grace+lateTime, give)
	defer late.Stop()
	hung := time.AfterFunc(how.Grace+hungTime, give)
	defer hung.Stop()
	client := shim.NewClient(m.runtimeDir(vm.ID))
	go func() {
		if _, err := client.Status(bounded); err == nil {
			hung.Stop()
		}
	}()
	err := client.Stop(bounded, how)
	if err == nil {
		// The shim writes the exit down before it goes.
		err = proc.Wait(bounded, vm.ShimPID, vm.ShimStart)
	}
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		// A shim that does not answer can't be asked for anything.
		if killErr := m.killShim(ctx, vm, proc.KillTime); killErr != nil {
			return errors.Join(err, killErr)
		}
	}
	return nil
}

// killShim ends a shim and its VMM by force. Neither pid is trusted without its
// start time.
func (m *Manager) killShim(ctx context.Context, vm store.VM, limit time.Duration) error {
	if vm.BootID != m.bootID() {
		return nil // the host was rebooted: nothing of that run is alive
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, proc.ErrUnkillable)
	defer cancel()
	return errors.Join(
		proc.Kill(ctx, vm.ShimPID, vm.ShimStart),
		proc.Kill(ctx, vm.PID, vm.PIDStart),
	)
}

// recordDeadShim cleans up after a shim that died, and records its VM's exit.
func (m *Manager) recordDeadShim(ctx context.Context, vm store.VM, limit time.Duration) error {
	if err := m.killShim(ctx, vm, limit); err != nil {
		return fmt.Errorf("end what is left of VM %q: %w", vm.ID, err)
	}
	changed, err := m.store.MarkEnded(ctx, vm.ID, vm.Run, smolvm.StateError, causeShimDied, time.Now().UTC())
	if err != nil || !changed {
		return err
	}
	m.forgetClient(vm.ID)
	m.note(ctx, vm.ID, "exit", time.Now(), causeShimDied)
	return shim.RemoveRuntimeDir(m.runtimeDir(vm.ID))
}

const causeShimDied = "the VM's shim ended unexpectedly"

// erase removes all that belongs to a VM that does not run. The row goes last: as
// long as anything is left, the VM is there to be deleted.
func (m *Manager) erase(ctx context.Context, vm store.VM) error {
	m.forgetClient(vm.ID)
	m.disown(vm.ID)
	return m.site().Erase(ctx, vm, m.runtimeDir(vm.ID))
}

// eraseNetwork removes what a VM that is deleted has left on the host, if its shim could not.
// Without the privileges the VM is deleted all the same, and the error says what is left.
func (m *Manager) eraseNetwork(ctx context.Context, vm store.VM) error {
	if !network.UsesTAP(vm.Config.Network.Mode) {
		return nil
	}
	if err := m.collectNetwork(ctx, vm.ID); err != nil {
		return fmt.Errorf("VM %q is deleted, but not all of its network: %w", vm.ID, err)
	}
	return nil
}
