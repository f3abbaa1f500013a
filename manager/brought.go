package manager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// broughtDisk is a disk that is there before the VM is, and the field of the configuration that
// brings it.
type broughtDisk struct{ field, path, format string }

// needsOf returns what a VM with such disks needs of its backend. Why a format is not known is
// another error.
func needsOf(files []broughtDisk, ownFormat string) traits.Needs {
	needs := traits.Needs{OwnFormat: ownFormat}
	for _, file := range files {
		if file.format != "" {
			needs.DiskFormats = append(needs.DiskFormats, file.format)
		}
	}
	return needs
}

// checkFormats calls bad with the fields that bring disks which a backend can't use, and returns
// what to do about the first.
func (m *Manager) checkFormats(backend vmm.Traits, config smolvm.VMConfig, files []broughtDisk, ownFormat string, bad func(field string, err error)) (hint string) {
	for _, file := range files {
		if format := needsOf([]broughtDisk{file}, "").Unmet(backend); format != "" {
			err := machine.UnusableFormat(backend, file.path, format)
			hint = cmp.Or(hint, smolvm.HintOf(err))
			bad(file.field, err)
		}
	}
	if format := (traits.Needs{OwnFormat: ownFormat}).Unmet(backend); format != "" {
		hint = cmp.Or(hint, "choose another backend or another id, or move the disk away")
		bad("id", fmt.Errorf("the disk of an earlier VM of that id was retained: %s is %s, and backend %s gives VMs disks that are %s",
			m.dir.Disk(config.ID, format), format, backend.Name, backend.DiskFormats[0]))
	}
	return hint
}

// exists reports whether there is a VM of that id.
func (m *Manager) exists(id string) bool {
	_, err := m.store.GetVM(context.Background(), id)
	return !errors.Is(err, smolvm.ErrVMNotFound)
}

// retainedFormat returns the format of the disk that is there for a new VM, as it was retained
// from an earlier VM of that id; empty if there is none, or one in each format.
func (m *Manager) retainedFormat(config smolvm.VMConfig) string {
	if !hasOwnDisk(config) {
		return ""
	}
	there := slices.DeleteFunc([]string{disk.QCOW2, disk.Raw}, func(format string) bool {
		_, err := os.Lstat(m.dir.Disk(config.ID, format))
		return err != nil
	})
	if len(there) != 1 || m.exists(config.ID) {
		return ""
	}
	return there[0]
}
