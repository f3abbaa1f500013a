package manager

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
)

// Reconcile makes what is written down agree with what is so, after processes or
// the host have died: VMs that are said to be alive but are dead become
// [smolvm.StateError]; what is left of VMs that are gone is removed. It returns the ids of
// the VMs that ran, and became [smolvm.StateError] since the last Reconcile, whoever found
// that out, and are so still. Every other call does the same for the VMs that it looks at, so
// nothing depends on Reconcile; it collects what nobody looks at any more.
func (m *Manager) Reconcile(ctx context.Context) ([]string, error) {
	vms, err := m.store.ListVMs(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("reconcile: %w", err)
	}
	dead := []string{}
	known := map[string]bool{}
	var errs []error
	for _, vm := range vms {
		known[vm.ID], known[datadir.OwnerLock(vm.ID)] = true, true
		if !vm.State.Alive() {
			errs = append(errs, m.reclaimOrphan(ctx, vm))
			continue
		}
		_, err := m.settle(ctx, vm)
		errs = append(errs, err)
	}
	failed, err := m.store.TakeFailed(ctx)
	dead, errs = append(dead, failed...), append(errs, err)
	errs = append(errs, m.reclaim(ctx, known), m.templates.Saved.Clean(), m.snapshots.Clean(), m.pools.Reconcile(ctx), m.disks.Collect(ctx), disk.RemoveIncomplete(m.dir.Disks()), cgroup.Sweep("/", cgroup.IdleAge))
	errs = append(errs, m.collectNetwork(ctx, "")) // after all that may have been killed just now
	return dead, errors.Join(errs...)
}

// reclaim removes logs and locks of VMs that have no row. Disks without a row are
// kept: they were retained on purpose, as a row outlives its VM's own disk.
func (m *Manager) reclaim(ctx context.Context, known map[string]bool) error {
	var errs []error
	for _, dir := range []string{m.dir.VMs(), m.dir.Locks()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			errs = append(errs, fmt.Errorf("reclaim: %w", err))
			continue
		}
		for _, entry := range entries {
			if !known[entry.Name()] {
				errs = append(errs, m.reclaimVM(ctx, entry.Name()))
			}
		}
	}
	return errors.Join(errs...)
}

// reclaimOrphan deletes an ephemeral VM whose creator died before it could start or
// delete it.
func (m *Manager) reclaimOrphan(ctx context.Context, vm store.VM) error {
	if !vm.Config.Ephemeral || !m.orphaned(vm.ID) {
		return nil
	}
	return m.site().EraseEphemeral(ctx, vm.ID, m.runtimeDir(vm.ID))
}

// reclaimVM removes what a VM without a row has left, unless the VM is being made
// or deleted just now.
func (m *Manager) reclaimVM(ctx context.Context, id string) error {
	lock, err := m.tryLock(id)
	if errors.Is(err, datadir.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := m.store.GetVM(ctx, id); !errors.Is(err, smolvm.ErrVMNotFound) {
		lock.unlock()
		return err
	}
	err = errors.Join(os.RemoveAll(m.vmDir(id)), shim.RemoveRuntimeDir(m.runtimeDir(id)))
	lock.remove()
	return err
}
