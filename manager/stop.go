package manager

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
)

// Stop shuts a VM down: by asking its agent, then its power button, then by ending
// the VMM, all within the timeout. Stopping a VM that does not run does nothing and
// is no error. An ephemeral VM is deleted thereby; what is returned is then the last
// that was known of it.
func (m *Manager) Stop(ctx context.Context, id string, opts StopOptions) (smolvm.VMInfo, error) {
	began := time.Now()
	lock, err := m.lockExisting(ctx, id)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	vm, err := m.lookup(ctx, id)
	if err != nil || !vm.State.Alive() {
		lock.unlock()
		return m.info(vm), err
	}
	vm, err = m.end(ctx, vm, opts.timeout())
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

func (o StopOptions) timeout() time.Duration {
	switch {
	case o.Timeout == 0:
		return DefaultStopTimeout
	case o.Timeout < 0:
		return 0
	}
	return o.Timeout
}

// Delete stops a VM and removes all that belongs to it: disk, logs, leases. With
// RetainDisk the disk stays, and the VM is shut down in an orderly way first;
// otherwise nothing of it is worth the wait.
func (m *Manager) Delete(ctx context.Context, id string) error {
	began := time.Now()
	lock, err := m.lockExisting(ctx, id)
	if err != nil {
		return err
	}
	vm, err := m.lookup(ctx, id)
	if err == nil && vm.State.Alive() {
		var grace time.Duration
		if vm.Config.RetainDisk {
			grace = DefaultStopTimeout
		}
		vm, err = m.end(ctx, vm, grace)
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
	lock.remove()
	m.note(ctx, id, "delete", began, "")
	return nil
}

// lockExisting is lock for a VM that must be there, so that no lock is made for
// one that is not.
func (m *Manager) lockExisting(ctx context.Context, id string) (*vmLock, error) {
	if err := smolvm.ValidateID(id); err != nil {
		return nil, err
	}
	if _, err := m.store.GetVM(ctx, id); err != nil {
		return nil, err
	}
	lock, err := m.lock(ctx, id)
	if err != nil {
		return nil, err
	}
	// It may have been deleted while we waited.
	if _, err := m.store.GetVM(ctx, id); err != nil {
		if errors.Is(err, smolvm.ErrVMNotFound) {
			lock.remove()
		} else {
			lock.unlock()
		}
		return nil, err
	}
	return lock, nil
}

// end ends a living VM, and returns when its shim is gone and its end is written
// down. It is called with the VM's lock held.
func (m *Manager) end(ctx context.Context, vm store.VM, grace time.Duration) (store.VM, error) {
	m.forgetClient(vm.ID)
	client := shim.NewClient(m.runtimeDir(vm.ID))
	stopErr := client.Stop(ctx, grace)
	if stopErr == nil {
		// The shim writes the exit down before it goes.
		stopErr = proc.Wait(ctx, vm.ShimPID, vm.ShimStart)
	}
	if stopErr != nil && ctx.Err() != nil {
		return vm, context.Cause(ctx)
	}
	if stopErr != nil {
		// A shim that does not answer can't be asked for anything.
		if err := m.killShim(ctx, vm); err != nil {
			return vm, errors.Join(stopErr, err)
		}
	}
	if _, err := m.store.MarkEnded(ctx, vm.ID, vm.Run, smolvm.StateStopped, "stopped by request", time.Now().UTC()); err != nil {
		return vm, err
	}
	if err := shim.RemoveRuntimeDir(m.runtimeDir(vm.ID)); err != nil {
		return vm, err
	}
	return m.store.GetVM(ctx, vm.ID)
}

// killShim ends a shim and its VMM by force. Neither pid is trusted without its
// start time.
func (m *Manager) killShim(ctx context.Context, vm store.VM) error {
	if vm.BootID != m.bootID() {
		return nil // the host was rebooted: nothing of that run is alive
	}
	return errors.Join(
		proc.Kill(ctx, vm.ShimPID, vm.ShimStart),
		proc.Kill(ctx, vm.PID, vm.PIDStart),
	)
}

// bury does what the shim of a VM would have done at its end, had it not died.
func (m *Manager) bury(ctx context.Context, vm store.VM, cause string) error {
	if err := m.killShim(ctx, vm); err != nil {
		return fmt.Errorf("end what is left of VM %q: %w", vm.ID, err)
	}
	changed, err := m.store.MarkEnded(ctx, vm.ID, vm.Run, smolvm.StateError, cause, time.Now().UTC())
	if err != nil || !changed {
		return err
	}
	m.forgetClient(vm.ID)
	m.note(ctx, vm.ID, "exit", time.Now(), cause)
	return shim.RemoveRuntimeDir(m.runtimeDir(vm.ID))
}

// erase removes all that belongs to a VM that does not run. The row goes last: as
// long as anything is left, the VM is there to be deleted.
func (m *Manager) erase(ctx context.Context, vm store.VM) error {
	m.forgetClient(vm.ID)
	m.disown(vm.ID)
	leaves := false
	if err := shim.RemoveRuntimeDir(m.runtimeDir(vm.ID)); err != nil {
		return err
	}
	paths := []string{m.vmDir(vm.ID)}
	if !vm.Config.RetainDisk && vm.DiskPath != vm.Config.RootfsPath {
		paths = append(paths, vm.DiskPath)
		leaves = m.disks.Leaves(vm.DiskPath)
	}
	for _, path := range paths {
		if path == "" {
			continue
		}
		if err := os.RemoveAll(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := m.store.DeleteVM(ctx, vm.ID); err != nil {
		return err
	}
	if leaves {
		m.reclaimLayersAside(ctx, vm.ID)
	}
	return nil
}
