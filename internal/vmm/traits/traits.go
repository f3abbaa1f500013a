// Package traits lists the backends that this program knows of, and what each declares of
// itself. It links no backend: whoever plans a start asks here, and only the shim runs a VMM.
//
// Each backend has a file of its own, and a line in [All].
package traits

import (
	"fmt"
	"slices"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Auto is the name that stands for the first backend that can run VMs on a host; see [List.First].
const Auto = "auto"

// List lists the traits of backends, in the order in which [Auto] prefers them. The last needs
// the least of a host.
type List []vmm.Traits

// All returns the traits of every backend.
func All() List {
	return List{
		Firecracker(),
		QEMU(),
	}
}

// With returns a list in which some traits take the place of those of the same name, or come
// last.
func (l List) With(traits ...vmm.Traits) List {
	all := slices.Clone(l)
	for _, t := range traits {
		if i := slices.IndexFunc(all, func(other vmm.Traits) bool { return other.Name == t.Name }); i >= 0 {
			all[i] = t
		} else {
			all = append(all, t)
		}
	}
	return all
}

// Lookup returns the traits of the named backend. The error matches
// [smolvm.ErrUnknownBackend], and its hint lists those that are known.
func Lookup(name string) (vmm.Traits, error) { return All().Lookup(name) }

// Lookup returns the traits of the named backend. The error is that of [Lookup].
func (l List) Lookup(name string) (vmm.Traits, error) {
	names := []string{Auto}
	for _, t := range l {
		if t.Name == name {
			return t, nil
		}
		names = append(names, t.Name)
	}
	return vmm.Traits{}, &smolvm.Error{
		Code: smolvm.CodeUnknownBackend,
		Hint: "this program knows the backends " + strings.Join(names, ", "),
		Err:  fmt.Errorf("%w: %q", smolvm.ErrUnknownBackend, name),
	}
}

// Needs are what a VM asks of its backend.
type Needs struct {
	// DiskFormats are the formats of the disks that the VM is to be given.
	DiskFormats []string
	// OwnFormat is that of the VM's own disk, if it is there already; empty: it is not. It is
	// the first that the VM's backend lists.
	OwnFormat string
}

// Unmet returns the first format of a disk that a backend can't use; empty if there is none.
func (n Needs) Unmet(t vmm.Traits) string {
	if n.OwnFormat != "" && (len(t.DiskFormats) == 0 || t.DiskFormats[0] != n.OwnFormat) {
		return n.OwnFormat
	}
	for _, format := range n.DiskFormats {
		if !slices.Contains(t.DiskFormats, format) {
			return format
		}
	}
	return ""
}

// Able returns the backends that can do what a VM asks for.
func (l List) Able(needs Needs) List {
	return slices.DeleteFunc(slices.Clone(l), func(t vmm.Traits) bool { return needs.Unmet(t) != "" })
}

// First returns the first of the backends that lacks nothing. Lacks returns what keeps a
// backend from running VMs on a host. If each lacks something, the error is a
// [*smolvm.PrerequisiteError] with all of it.
func (l List) First(lacks func(vmm.Traits) []smolvm.Finding) (vmm.Traits, error) {
	missing := &smolvm.PrerequisiteError{Backend: Auto}
	for _, t := range l {
		found := lacks(t)
		if len(found) == 0 {
			return t, nil
		}
		missing.Findings = append(missing.Findings, found...)
	}
	return vmm.Traits{}, missing
}

// Accelerator returns the first of a backend's accelerators that the host has.
func Accelerator(t vmm.Traits, has func(name string) bool) (name string, ok bool) {
	i := slices.IndexFunc(t.Accelerators, has)
	if i < 0 {
		return "", false
	}
	return t.Accelerators[i], true
}
