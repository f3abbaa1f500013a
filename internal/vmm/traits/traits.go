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

// Auto is the name that stands for the first backend that can run VMs on a host; see [First].
const Auto = "auto"

// All returns the traits of every backend, in the order in which [Auto] prefers them.
func All() []vmm.Traits {
	return []vmm.Traits{
		QEMU(),
	}
}

// Lookup returns the traits of the named backend. The error matches
// [smolvm.ErrUnknownBackend], and its hint lists those that are known.
func Lookup(name string) (vmm.Traits, error) { return find(All(), name) }

func find(all []vmm.Traits, name string) (vmm.Traits, error) {
	names := []string{Auto}
	for _, t := range all {
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

// First returns the first of the backends that lacks nothing. Lacks returns what keeps a
// backend from running VMs on a host. If each lacks something, the error is a
// [*smolvm.PrerequisiteError] with all of it.
func First(all []vmm.Traits, lacks func(vmm.Traits) []smolvm.Finding) (vmm.Traits, error) {
	missing := &smolvm.PrerequisiteError{Backend: Auto}
	for _, t := range all {
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
