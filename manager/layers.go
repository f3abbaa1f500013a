package manager

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

// vmsDrive returns the disk of a VM, which may be deleted, as a drive of another VM. The files
// of the user's that it is based on are those that the VM was created with. If its disk was
// retained nobody knows them any more, and the user names them again.
func (m *Manager) vmsDrive(ctx context.Context, drive smolvm.Drive) (vmm.Drive, error) {
	vms, err := m.store.ListVMs(ctx, "")
	if err != nil {
		return vmm.Drive{}, err
	}
	path := filepath.Join(m.dir.Disks(), filepath.Base(drive.Path))
	declared := declaredFiles(drive.Backing)
	i := slices.IndexFunc(vms, func(vm store.VM) bool { return vm.DiskPath == path })
	if i >= 0 {
		if len(declared) > 0 {
			return vmm.Drive{}, fmt.Errorf("%s: it is the disk of VM %q; what it is based on is known, and can't be named", drive.Path, vms[i].ID)
		}
		declared = rootFiles(vms[i].Config)
	}
	own, err := m.ownDrive(drive.Path, declared...)
	own.ReadOnly = drive.ReadOnly
	if i >= 0 {
		return own, err
	}
	if err == nil && !endsWith(own.Backing, declared) {
		err = fmt.Errorf("%s: it is not based on the files that were named", drive.Path)
	}
	if err != nil {
		err = &smolvm.Error{Err: err, Hint: "the VM of this disk is deleted: name all files of yours that the disk is based on, as in " +
			"`--drive PATH:qcow2,backing=NEAREST:qcow2,backing=NEXT:raw`, and none of smolvm's own"}
	}
	return own, err
}

// rootFiles returns the user's files that the disk of a VM is based on, the nearest first.
func rootFiles(config smolvm.VMConfig) []disk.File {
	root := rootDrive(config)
	return declaredFiles(append([]smolvm.DiskFile{{Path: root.Path, Format: root.Format}}, root.Backing...))
}

// endsWith reports whether a chain ends with such files.
func endsWith(chain []vmm.DiskFile, files []disk.File) bool {
	return len(chain) >= len(files) && slices.EqualFunc(chain[len(chain)-len(files):], files, func(a vmm.DiskFile, b disk.File) bool {
		return a.Path == b.Path && a.Format == b.Format
	})
}

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
