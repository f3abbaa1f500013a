package manager

import (
	"path"
	"slices"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/store"
)

// validateList checks the patterns of a list.
func validateList(o smolvm.ListOptions) error {
	for _, pattern := range o.IDs {
		if _, err := path.Match(pattern, ""); err != nil {
			return &smolvm.ValidationError{Fields: []smolvm.FieldError{{Field: "pattern", Problem: pattern + ": " + err.Error()}}}
		}
	}
	return nil
}

// selects reports whether a VM is to be listed.
func selects(o smolvm.ListOptions, vm store.VM) bool {
	for name, value := range o.Labels {
		if has, ok := vm.Config.Labels[name]; !ok || has != value {
			return false
		}
	}
	return (o.State == "" || o.State == vm.State) &&
		(o.Image == "" || isImage(vm, o.Image)) &&
		(len(o.IDs) == 0 || slices.ContainsFunc(o.IDs, func(pattern string) bool {
			ok, _ := path.Match(pattern, vm.ID) // the pattern was validated
			return ok
		}))
}

// minDigits is the shortest beginning of a digest that stands for it, in digits, as for
// images.
const minDigits = 8

// isImage reports whether ref is the name, the digest, or the beginning of the digest of
// a VM's image.
func isImage(vm store.VM, ref string) bool {
	digits := strings.TrimPrefix(ref, "sha256:")
	return vm.Config.Image == ref ||
		len(digits) >= minDigits && strings.HasPrefix(strings.TrimPrefix(vm.Image, "sha256:"), digits)
}
