package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/store"
)

// BaseOf returns the file that a VM's own disk is based on when it is new.
func (b *Builder) BaseOf(ctx context.Context, vm store.VM) (path, format string, err error) {
	if vm.Layer == "" {
		return b.UsualBase(ctx, vm.Config, vm.Image)
	}
	if _, err := os.Stat(vm.Layer); err != nil {
		return "", "", fmt.Errorf("the disk of the snapshot that it is restored from is missing: %w; delete the VM, and restore it anew", err)
	}
	return vm.Layer, disk.FormatOf(vm.Layer), nil
}

// UsualBase returns the root file system of a VM that is not restored from a snapshot.
func (b *Builder) UsualBase(ctx context.Context, config smolvm.VMConfig, digest string) (path, format string, err error) {
	if digest == "" {
		return config.RootfsPath, string(config.RootfsFormat), nil
	}
	image, err := b.Images.Get(ctx, digest)
	return Rootfs(image, config.DiskSizeMiB), disk.Raw, err
}

// Rootfs returns the root file system of an image for a disk of so many MiB; 0: as large
// as the image wants it. A guest of an image makes it as large as the disk.
func Rootfs(image smolvm.Image, sizeMiB int64) string {
	if sizeMiB == 0 || image.SmallRootfsPath == "" {
		return image.RootfsPath
	}
	if usual, err := os.Stat(image.RootfsPath); err != nil || sizeMiB<<20 >= usual.Size() {
		return image.RootfsPath
	}
	return image.SmallRootfsPath
}

// EnsureDisk makes the disk of a new VM, unless one was retained from an earlier VM of
// that id. A process that was killed while it created a VM may have left one without a
// disk, so Start calls it too; but a disk that a guest has used is never made again.
//
// A raw disk is not made yet, as it takes longer, and may be a copy of another base than this
// one: the first start makes it of what it starts from, by [Builder.Rebase].
func (b *Builder) EnsureDisk(ctx context.Context, vm store.VM) error {
	if vm.DiskPath == "" {
		return nil
	}
	_, err := os.Stat(vm.DiskPath)
	switch {
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("find disk: %w", err)
	case vm.State != smolvm.StateCreated || vm.DiskPath == vm.Config.RootfsPath:
		return fmt.Errorf("its disk %s is missing; put it back, or delete the VM", vm.DiskPath)
	}
	made := backing.Disk{Path: vm.DiskPath, Size: vm.Config.DiskSizeMiB << 20}
	if made.Base, made.BaseFormat, err = b.BaseOf(ctx, vm); err != nil {
		return err
	}
	switch {
	case disk.FormatOf(vm.DiskPath) == disk.Raw:
		return nil
	case vm.Layer == "":
		return b.Disks.Create(ctx, made)
	}
	return b.Disks.Derive(ctx, made)
}

// Rebase makes a VM's disk anew, from base. A VM without a disk has none after that either.
func (b *Builder) Rebase(ctx context.Context, vm store.VM, base, format string) error {
	if vm.DiskPath == "" {
		return nil
	}
	return b.Disks.Derive(ctx, backing.Disk{
		Path: vm.DiskPath, Base: base, BaseFormat: format, Size: vm.Config.DiskSizeMiB << 20, Replace: true,
		Sync: vm.State != smolvm.StateCreated, // it takes the place of one with data
	})
}
