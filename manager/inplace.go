package manager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/start"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
)

// restoreInPlace has the VM that a snapshot was taken of go back to it. If it can't go on
// from there, it is as it was before.
func (m *Manager) restoreInPlace(ctx context.Context, meta snapshotMeta, from start.Saved, damage error, opts smolvm.RestoreOptions) (smolvm.VMInfo, error) {
	began := time.Now()
	fail := func(err error) (smolvm.VMInfo, error) {
		return smolvm.VMInfo{}, fmt.Errorf("restore snapshot %q in place: %w", from.Source, err)
	}
	switch {
	case opts.ID != "" && opts.ID != meta.VMID:
		return fail(fmt.Errorf("%w: it is of VM %q, not of %q", smolvm.ErrUnsupported, meta.VMID, opts.ID))
	case opts.Egress != nil:
		return fail(fmt.Errorf("%w: the VM keeps its egress policy; change it with `smolvm policy set`", smolvm.ErrUnsupported))
	case opts.WithoutSecrets:
		return fail(fmt.Errorf("%w: the VM keeps its secrets; restore the snapshot as another VM", smolvm.ErrUnsupported))
	case opts.Ephemeral:
		return fail(fmt.Errorf("%w: a VM that is there already can't be made ephemeral", smolvm.ErrUnsupported))
	}
	before, lock, err := m.acquire(ctx, meta.VMID)
	if err != nil {
		return fail(err)
	}
	defer lock.unlock()
	if err := meta.isOf(before); err != nil {
		return fail(err)
	}
	vm := before
	vm.Config = meta.machine(before.Config)
	if damage == nil {
		damage = m.compatible(ctx, vm, meta.Hardware)
	}
	if damage != nil && from.Must && !opts.Start.Cold {
		return fail(start.NotRestored(damage))
	}
	if err := m.keepDisk(ctx, before); err != nil {
		return fail(err)
	}
	step.Reached(ctx, "in place/disk kept")
	if !reflect.DeepEqual(vm.Config, before.Config) {
		err = m.store.SetConfig(ctx, vm)
	}
	var info smolvm.VMInfo
	if err == nil {
		info, err = m.startLocked(ctx, vm, opts.Start, &from, damage)
	}
	if err != nil {
		return fail(errors.Join(err, m.putBack(context.WithoutCancel(ctx), before, err)))
	}
	step.Reached(ctx, "in place/started")
	_ = os.Remove(m.keptDisk(vm.ID)) // or the next start does it
	m.site().Collect(context.WithoutCancel(ctx), vm.ID)
	m.note(ctx, vm.ID, "restore", began, from.Source)
	return info, nil
}

// isOf returns an error if a VM is not the one that the snapshot was taken of, or can't go
// back to it now.
func (meta snapshotMeta) isOf(vm store.VM) error {
	switch {
	case vm.State.Alive():
		return stateError("restore", vm)
	case vm.State == smolvm.StateCreated,
		vm.Image != meta.Image,
		vm.Config.DiskMode != meta.Config.DiskMode,
		(vm.DiskPath == "") != (meta.Layer == ""),
		disk.FormatOf(vm.DiskPath) != cmp.Or(meta.DiskFormat, disk.QCOW2),
		// Only an agent can tell a guest that it is another VM now.
		!meta.Config.UsesImage() && vm.MachineID != meta.MachineID:
		return fmt.Errorf("%w: VM %q is not the one that it was taken of, but a later one of the same id", smolvm.ErrUnsupported, vm.ID)
	}
	return nil
}

// machine is the configuration of a VM that goes back to the snapshot: with the CPUs,
// memory, disks and kernel of then, and all else as it is now.
func (meta snapshotMeta) machine(now smolvm.VMConfig) smolvm.VMConfig {
	was := meta.Config
	now.VCPUs, now.MemoryMiB, now.DiskSizeMiB, now.Drives = was.VCPUs, was.MemoryMiB, was.DiskSizeMiB, was.Drives
	now.KernelPath, now.InitrdPath, now.BootArgs = was.KernelPath, was.InitrdPath, was.BootArgs
	return now
}

// keptDisk is where the disk of a VM is kept while the VM goes back to a snapshot.
func (m *Manager) keptDisk(id string) string { return filepath.Join(m.vmDir(id), "disk.kept") }

// keepDisk gives the disk of a VM a second name, for [Manager.putBack].
func (m *Manager) keepDisk(ctx context.Context, vm store.VM) error {
	if vm.DiskPath == "" {
		return nil
	}
	kept := m.keptDisk(vm.ID)
	if err := os.Remove(kept); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	unlock, err := m.disks.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.disks.Adopt(ctx, vm.DiskPath, kept); err != nil {
		return err
	}
	step.Reached(ctx, "in place/disk adopted")
	return os.Link(vm.DiskPath, kept)
}

// putBack makes a VM what it was before it was to go back to a snapshot.
func (m *Manager) putBack(ctx context.Context, before store.VM, cause error) error {
	err := errors.Join(m.putDiskBack(ctx, before), m.store.SetConfig(ctx, before),
		m.store.MarkNotStarted(ctx, before.ID, before.State, "going back to a snapshot failed: "+cause.Error()))
	m.site().Collect(ctx, before.ID)
	return err
}

func (m *Manager) putDiskBack(ctx context.Context, vm store.VM) error {
	if vm.DiskPath == "" {
		return nil
	}
	unlock, err := m.disks.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	kept := m.keptDisk(vm.ID)
	if err := m.disks.Adopt(ctx, kept, vm.DiskPath); err != nil {
		return err
	}
	// If both are names of the same file, rename does nothing.
	if err := os.Rename(kept, vm.DiskPath); err != nil {
		return err
	}
	if err := os.Remove(kept); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.Sync(filepath.Dir(vm.DiskPath))
}
