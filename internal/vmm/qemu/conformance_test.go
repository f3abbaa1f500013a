package qemu_test

import (
	"os"
	"strconv"
	"testing"

	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/qemu"
	"github.com/smolvm/smolvm/internal/vmm/vmmtest"
)

// consoleBytes is little, but more than a boot prints.
const consoleBytes = 100 << 10

func TestConformance(t *testing.T) {
	testenv.RequireQEMU(t)
	tests := []struct {
		name, machine, accelerator, bootArgs, skipClock string
	}{
		{"emulated q35", "q35", vmm.TCG, "", ""},
		// Not what is chosen for VMs, but it shows on any host that devices on
		// virtio-mmio work as those on PCI do. The kernel can't calibrate the time
		// stamp counter there, so it is told a frequency, and not to go by it.
		{
			"emulated microvm", "microvm", vmm.TCG, "tsc_early_khz=2000000 tsc=unstable",
			"the guest's clock counts timer interrupts, of which a busy host loses some",
		},
		{"q35 on KVM", "q35", vmm.KVM, "", ""},
		{"microvm on KVM", "microvm", vmm.KVM, "", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.accelerator == vmm.KVM {
				testenv.RequireKVM(t)
			}
			vmmtest.Run(t,
				func(testing.TB) vmm.Backend {
					return qemu.New(qemu.Options{Machine: test.machine, ConsoleBytes: consoleBytes})
				},
				vmmtest.Assets{
					Kernel:      testenv.Kernel(t),
					Initrd:      testenv.Initramfs,
					Accelerator: test.accelerator,
					BootArgs:    test.bootArgs,
					SkipClock:   test.skipClock,
					BusySaves:   busySaves(t, test.machine),

					ConsoleBytes: consoleBytes,
				})
		})
	}
}

// busySavesEnv is how often each busy guest is saved, for a long run.
const busySavesEnv = "SMOLVM_TEST_BUSY_SAVES"

// busySaves is few usually, and none on machines that emulated VMs don't get. Where QEMU's
// word was taken for what a guest has changed, a third of them were bad.
func busySaves(t *testing.T, machine string) int {
	text := os.Getenv(busySavesEnv)
	switch {
	case text == "" && machine == "q35":
		return 4
	case text == "":
		return 0
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
