package machine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Drives returns the disks of a VM, each with the files that it is based on. No format is
// taken from what a disk holds, which a guest may have written.
func (b *Builder) Drives(vm store.VM) ([]vmm.Drive, error) {
	users := vm.Config.Drives
	var drives []vmm.Drive
	switch vm.DiskPath {
	case "":
	case vm.Config.RootfsPath:
		users = append([]smolvm.Drive{RootDrive(vm.Config)}, users...)
	default:
		own, err := b.Own(vm.DiskPath, rootFiles(vm.Config)...)
		if err != nil {
			return nil, err
		}
		drives = append(drives, own)
	}
	for _, drive := range users {
		found, err := b.Users(drive)
		if err != nil {
			return nil, err
		}
		drives = append(drives, found)
	}
	return drives, nil
}

// Users returns a disk that the user names. One that is qcow2 is looked at each time, as it
// may have been another VM's raw one meanwhile. It may also be the disk of a VM of ours.
func (b *Builder) Users(drive smolvm.Drive) (vmm.Drive, error) {
	if drive.Format != smolvm.FormatRaw {
		ours, err := b.Disks.IsOurs(context.Background(), drive.Path)
		if err != nil {
			return vmm.Drive{}, err
		}
		if ours {
			return b.vmsDrive(context.Background(), drive)
		}
	}
	info, chain, err := Declare(drive)
	if errors.Is(err, disk.ErrNoFileSystem) {
		err = nil // an empty drive is fine: the guest may make a file system on it
	}
	return vmm.Drive{Path: drive.Path, Format: info.Format, ReadOnly: drive.ReadOnly, Device: info.Device, Backing: chainFiles(chain)}, err
}

// vmsDrive returns the disk of a VM, which may be deleted, as a drive of another VM. The files
// of the user's that it is based on are those that the VM was created with. If its disk was
// retained nobody knows them any more, and the user names them again.
func (b *Builder) vmsDrive(ctx context.Context, drive smolvm.Drive) (vmm.Drive, error) {
	vms, err := b.Store.ListVMs(ctx, "")
	if err != nil {
		return vmm.Drive{}, err
	}
	path := filepath.Join(b.Dir.Disks(), filepath.Base(drive.Path))
	declared := declaredFiles(drive.Backing)
	i := slices.IndexFunc(vms, func(vm store.VM) bool { return vm.DiskPath == path })
	if i >= 0 {
		if len(declared) > 0 {
			return vmm.Drive{}, fmt.Errorf("%s: it is the disk of VM %q; what it is based on is known, and can't be named", drive.Path, vms[i].ID)
		}
		declared = rootFiles(vms[i].Config)
	}
	own, err := b.Own(drive.Path, declared...)
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
	root := RootDrive(config)
	return declaredFiles(append([]smolvm.DiskFile{{Path: root.Path, Format: root.Format}}, root.Backing...))
}

// endsWith reports whether a chain ends with such files.
func endsWith(chain []vmm.DiskFile, files []disk.File) bool {
	return len(chain) >= len(files) && slices.EqualFunc(chain[len(chain)-len(files):], files, func(file vmm.DiskFile, want disk.File) bool {
		return file.Path == want.Path && file.Format == want.Format
	})
}

// RootDrive returns the root file system that the user brings.
func RootDrive(config smolvm.VMConfig) smolvm.Drive {
	return smolvm.Drive{Path: config.RootfsPath, Format: config.RootfsFormat, Backing: config.RootfsBacking}
}

// Declare looks at a disk that the user names, and what it is based on.
func Declare(drive smolvm.Drive) (disk.Info, []disk.File, error) {
	return disk.DeclareChain(disk.File{Path: drive.Path, Format: string(drive.Format)}, declaredFiles(drive.Backing))
}

func declaredFiles(files []smolvm.DiskFile) []disk.File {
	var declared []disk.File
	for _, file := range files {
		declared = append(declared, disk.File{Path: file.Path, Format: string(file.Format)})
	}
	return declared
}

func chainFiles(chain []disk.File) []vmm.DiskFile {
	var files []vmm.DiskFile
	for _, file := range chain {
		files = append(files, vmm.DiskFile(file))
	}
	return files
}

// Own returns a disk in the data directory, as we have made it, or as it is to be made.
// Declared as for [backing.Disks.Chain].
func (b *Builder) Own(path string, declared ...disk.File) (vmm.Drive, error) {
	chain, err := b.Disks.Chain(path, declared...)
	return vmm.Drive{Path: path, Format: disk.FormatOf(path), Backing: chainFiles(chain)}, err
}
