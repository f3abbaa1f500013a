package manager

import (
	"context"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/store"
)

// rebase makes a VM's disk anew, as an overlay of base. A VM without a disk has none after
// that either.
func (m *Manager) rebase(ctx context.Context, vm store.VM, base, format string) error {
	if vm.DiskPath == "" {
		return nil
	}
	return m.disks.Derive(ctx, backing.Overlay{
		Path: vm.DiskPath, Base: base, BaseFormat: format, Size: vm.Config.DiskSizeMiB << 20, Replace: true,
		Sync: vm.State != smolvm.StateCreated, // it takes the place of one with data
	})
}

// reclaimLayers removes the layers that nothing needs any more.
func (m *Manager) reclaimLayers(ctx context.Context) error { return m.disks.Collect(ctx) }
