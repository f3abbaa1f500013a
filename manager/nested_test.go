package manager_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

// A guest has a CPU with virtualization if its VM asks for that, and never otherwise; no guest
// of the one kind is a clone of one of the other.
func TestNestedVirtualization(t *testing.T) {
	t.Parallel()
	m := openFast(t)
	if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{}); err != nil {
		t.Fatal(err)
	}
	virtualization := func(vm smolvm.VMInfo) bool {
		t.Helper()
		flags := strings.Fields(sh(t, m, vm.ID, "grep -m 1 ^flags /proc/cpuinfo"))
		for _, flag := range flags {
			if flag == "svm" || flag == "vmx" {
				return true
			}
		}
		if len(flags) < 10 {
			t.Errorf("the CPU of VM %s has the flags %q", vm.ID, flags)
		}
		return false
	}
	plain := mustRun(t, m, smolvm.VMConfig{ID: "plain"})
	startReport(t, plain, smolvm.StartClone)
	if virtualization(plain) {
		t.Error("a guest has virtualization that was not asked for")
	}
	vm, err := m.Start(t.Context(), mustCreate(t, m, smolvm.VMConfig{ID: "nested", NestedVirtualization: true}).ID, smolvm.StartOptions{})
	if errors.Is(err, smolvm.ErrUnsupported) && plain.Accelerator == "kvm" {
		t.Skip("the host's KVM has none to pass on: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if vm.Start.Method == smolvm.StartClone {
		t.Error("it is a clone of a guest without virtualization")
	}
	if !virtualization(vm) || !vm.Config.NestedVirtualization {
		t.Error("a guest that asked for virtualization has none")
	}
}
