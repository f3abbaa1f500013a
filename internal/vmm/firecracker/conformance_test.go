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
	vmmtest.Run(t,
		func(testing.TB) vmm.Backend {
			return firecracker.New(firecracker.Options{ConsoleBytes: consoleBytes, Launcher: namespacetest.Program()})
		},
		vmmtest.Assets{
			Kernel:       testenv.Kernel(t),
			Initrd:       initrd,
			Accelerator:  vmm.KVM,
			ConsoleBytes: consoleBytes,
			Traits:       traits.Firecracker(),
			NoMTU:        true, // of the release that the tests run; 1.16 is the first that offers one
			// No busy guest is saved: Firecracker holds a guest before it looks at its memory, and
			// the nested machine of kvmtest hangs with one that is busy on two CPUs.
			BusySaves: 0,
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
