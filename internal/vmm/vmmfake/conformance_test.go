package vmmfake_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/vmmfake"
	"github.com/smolvm/smolvm/internal/vmm/vmmtest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == vmmfake.Command {
		os.Exit(vmmfake.Main(os.Args[2:]))
	}
	os.Exit(testenv.Main(m.Run))
}

// consoleBytes is little, but more than a boot prints.
const consoleBytes = 100 << 10

// What passes for a VMM in tests of the engine keeps the contract that those with real
// guests keep.
func TestConformance(t *testing.T) {
	kernel := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(kernel, []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	vmmtest.Run(t,
		func(testing.TB) vmm.Backend { return vmmfake.New(vmmfake.Options{ConsoleBytes: consoleBytes}) },
		vmmtest.Assets{
			Kernel:       kernel,
			Initrd:       vmmfake.Initramfs,
			Accelerator:  vmm.TCG,
			ConsoleBytes: consoleBytes,
			SkipTAP:      "the fake VMM has no TAP interfaces",
		})
}
