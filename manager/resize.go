package manager

import (
	"context"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/step"
)

// Resize makes the disk of a VM that does not run larger. The guest of an image has its
// root file system grown at the next start; other guests see the larger disk.
//
// The error matches [smolvm.ErrVMNotFound], [smolvm.ErrInvalidState] if the VM runs, or
// [smolvm.ErrUnsupported] if the VM has no disk of its own, or is a
// [*smolvm.ValidationError].
func (m *Manager) Resize(ctx context.Context, id string, opts smolvm.ResizeOptions) (smolvm.VMInfo, error) {
	began := time.Now()
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	defer lock.unlock()
	switch {
	case vm.State.Alive():
		return smolvm.VMInfo{}, stateError("resize", vm)
	case vm.DiskPath == "" || vm.DiskPath == vm.Config.RootfsPath:
		return smolvm.VMInfo{}, fmt.Errorf("resize VM %q: %w: it has no disk of its own", id, smolvm.ErrUnsupported)
	}
	config := vm.Config
	config.DiskSizeMiB = opts.DiskSizeMiB
	if err := config.Validate(); err != nil {
		return smolvm.VMInfo{}, err
	}
	info, err := disk.Inspect(vm.DiskPath, disk.QCOW2)
	if err != nil {
		return smolvm.VMInfo{}, vmError("resize", id, err)
	}
	if opts.DiskSizeMiB<<20 < info.VirtualSize {
		return smolvm.VMInfo{}, &smolvm.ValidationError{ID: id, Fields: []smolvm.FieldError{{
			Field: "disk_size_mib",
			Problem: fmt.Sprintf("%d MiB is smaller than the disk, which has %d; a disk can't be made smaller",
				opts.DiskSizeMiB, info.VirtualSize>>20),
		}}}
	}
	if err := disk.Grow(vm.DiskPath, disk.QCOW2, opts.DiskSizeMiB<<20); err != nil {
		return smolvm.VMInfo{}, vmError("resize", id, err)
	}
	step.Reached(ctx, "resize/grown")
	if err := m.store.SetConfig(ctx, id, config); err != nil {
		return smolvm.VMInfo{}, vmError("resize", id, err)
	}
	step.Reached(ctx, "resize/written")
	vm.Config = config
	m.note(ctx, id, "resize", began, fmt.Sprintf("disk of %d MiB", opts.DiskSizeMiB))
	return m.info(vm), nil
}
