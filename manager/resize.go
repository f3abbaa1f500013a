package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
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
	format := disk.FormatOf(vm.DiskPath)
	made := format != disk.Raw || !disk.IsUnwritten(vm.DiskPath) // a raw one is made by the first start
	info, err := m.diskInfo(ctx, vm, made)
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
	if made {
		if err := disk.Grow(vm.DiskPath, format, opts.DiskSizeMiB<<20); err != nil {
			return smolvm.VMInfo{}, vmError("resize", id, err)
		}
	}
	step.Reached(ctx, "resize/grown")
	vm.Config = config
	if err := m.store.SetConfig(ctx, vm); err != nil {
		return smolvm.VMInfo{}, vmError("resize", id, err)
	}
	step.Reached(ctx, "resize/written")
	m.note(ctx, id, "resize", began, fmt.Sprintf("disk of %d MiB", opts.DiskSizeMiB))
	return m.info(vm), nil
}

// diskInfo looks at the disk of a VM, or at what it is to be made of.
func (m *Manager) diskInfo(ctx context.Context, vm store.VM, made bool) (disk.Info, error) {
	path, format := vm.DiskPath, disk.FormatOf(vm.DiskPath)
	if !made {
		if vm.State != smolvm.StateCreated {
			return disk.Info{}, fmt.Errorf("its disk %s is missing", path)
		}
		var err error
		if path, format, err = m.machines.BaseOf(ctx, vm); err != nil {
			return disk.Info{}, err
		}
	}
	info, err := disk.Inspect(path, format)
	if errors.Is(err, disk.ErrNoFileSystem) {
		err = nil // a guest may make one of its own
	}
	if !made {
		info.VirtualSize = max(info.VirtualSize, vm.Config.DiskSizeMiB<<20)
	}
	return info, err
}
