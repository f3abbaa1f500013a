package manager

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// broughtDisk is a disk that is there before the VM is, and the field of the configuration that
// brings it.
type broughtDisk struct{ field, path, format string }

// usableBy returns an error if a backend can't use the disk. Why its format is not known is
// another one.
func (b broughtDisk) usableBy(backend vmm.Traits) error {
	if format := needsOf([]broughtDisk{b}).Unmet(backend); format != "" {
		err := machine.UnusableFormat(backend, b.path, format)
		if b.field == "id" {
			err = fmt.Errorf("the disk of an earlier VM of that id was retained: %w; choose another id, or move it away", err)
		}
		return err
	}
	return nil
}

// needsOf returns what a VM with such disks needs of its backend.
func needsOf(files []broughtDisk) traits.Needs {
	var needs traits.Needs
	for _, file := range files {
		if file.format != "" {
			needs.DiskFormats = append(needs.DiskFormats, file.format)
		}
	}
	return needs
}

// exists reports whether there is a VM of that id.
func (m *Manager) exists(id string) bool {
	_, err := m.store.GetVM(context.Background(), id)
	return !errors.Is(err, smolvm.ErrVMNotFound)
}

// retainedDisk returns the disk that is there for a VM that is to have one of its own, as it
// was retained from an earlier VM of that id; empty if there is none.
func (m *Manager) retainedDisk(config smolvm.VMConfig) string {
	if !hasOwnDisk(config) {
		return ""
	}
	for _, format := range []string{disk.QCOW2, disk.Raw} {
		path := m.dir.Disk(config.ID, format)
		if _, err := os.Lstat(path); err == nil {
			return path
		}
	}
	return ""
}
