package firecracker_test

import (
	"os"
	"os/exec"
	"testing"

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
	vmmtest.Run(t,
		func(testing.TB) vmm.Backend {
			return firecracker.New(firecracker.Options{ConsoleBytes: consoleBytes, Launcher: launcherProgram()})
		},
		vmmtest.Assets{
			Kernel:       testenv.Kernel(t),
			Initrd:       initrd,
			Accelerator:  vmm.KVM,
			ConsoleBytes: consoleBytes,
			Traits:       traits.Firecracker(),
			NoMTU:        true, // of the release that the tests run; 1.16 is the first that offers one
			BusySaves:    1,
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
