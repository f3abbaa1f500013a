package firecracker_test

import (
	"os"
	"os/exec"
	"testing"

	"github.com/smolvm/smolvm/internal/namespace/namespacetest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker"
	"github.com/smolvm/smolvm/internal/vmm/traits"
	"github.com/smolvm/smolvm/internal/vmm/vmmtest"
)

// consoleBytes is little, but more than a boot prints.
const consoleBytes = 100 << 10

func TestConformance(t *testing.T) {
	testenv.RequireKVM(t)
	if _, err := exec.LookPath(traits.FirecrackerProgram); err != nil {
		t.Skip("needs Firecracker: ", err)
	}
	assets := vmmtest.Assets{
		Kernel:       testenv.Kernel(t),
		Initrd:       initrd,
		Accelerator:  vmm.KVM,
		ConsoleBytes: consoleBytes,
		Traits:       traits.Firecracker(),
		NoMTU:        true, // of the release that the tests run; 1.16 is the first that offers one
		// No busy guest is saved: Firecracker holds a guest before it looks at its memory, and
		// the nested machine of kvmtest hangs with one that is busy on two CPUs.
		BusySaves: 0,
	}
	options := firecracker.Options{ConsoleBytes: consoleBytes, Launcher: namespacetest.Program()}
	t.Run("plain", func(t *testing.T) {
		vmmtest.Run(t, func(testing.TB) vmm.Backend { return firecracker.New(options) }, assets)
	})
	t.Run("in its jail", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("the jailer takes root")
		}
		jailer, err := exec.LookPath("jailer")
		if err != nil {
			t.Skip("needs Firecracker's jailer: ", err)
		}
		options, assets := options, assets
		options.Jailer = jailer
		assets.SkipDevice = "a jail has no block devices"
		vmmtest.Run(t, func(testing.TB) vmm.Backend { return firecracker.New(options) }, assets)
	})
}

// initrd makes an initramfs in which this test's program is the guest's end of the channel.
func initrd(t testing.TB, script string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	return testenv.InitramfsOf(t, script, map[string][]byte{vmmtest.RelayProgram: program})
}
