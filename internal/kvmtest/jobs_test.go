package kvmtest_test

import (
	"strings"
	"time"

	"github.com/smolvm/smolvm/internal/kvmtest"
)

// conformance chooses cases of the suite of VMMs, in one of its variants.
func conformance(variant string, cases ...string) []string {
	return []string{"-run=^TestConformance$/^" + variant + "$/^(" + strings.ReplaceAll(strings.Join(cases, "|"), " ", "_") + ")$"}
}

// jobs returns all that is to be tested on KVM. Each job boots an outer machine, where a guest boots
// in 5 to 8 s, so these are what KVM, Firecracker, its jail, or an ordinary user makes
// different. Left out, and why:
//
//   - Cases that fail before a guest runs, and those of bad network interfaces: what they test of
//     QEMU does not know the accelerator, and is tested of each emulated machine on any host.
//   - Most cases of q35 on KVM: it is the microvm's code with the devices of the emulated q35, whose
//     whole suite runs on any host.
//   - A guest that floods its console, on Firecracker: it takes almost four minutes there. It passed
//     the last time; before it was reset after some 80 s once, without a word of its kernel's. What
//     Firecracker logs of a triple fault is part of the VM's end since.
//   - A reboot of QEMU's microvm: it has hung once, after the guest's kernel had begun it, for a
//     reason that is not known yet.
//   - Saves of busy guests with 2 and 4 CPUs: the outer machine has one, on which they do not get on.
//   - Saves with overlays, on Firecracker, which has none.
//   - Starts that fail, in a jail: what fails in some of them is a script, and a jail has no shell.
//   - TAP interfaces of the host, and block devices, in a jail.
func jobs() []kvmtest.Job {
	firecracker := []string{"firecracker"}
	jailer := []string{"firecracker", "jailer"}
	own := []string{ // what is Firecracker's own in the contract
		"machine", "console", "clock", "channel", "no channel", "channel opened again", "drives", "shared drive", "network",
		"power-off", "reboot", "panic", "crash", "kill", "kill at once", "kill a VMM that hangs", "shutdown", "pause",
		"save", "save resets the channel", "save with raw disks", "save a guest that is held", "save fails", "restore fails",
		"leaves nothing open", "start fails", "bad network interface", "dies with its parent",
	}
	return append(engineJobs(firecracker, jailer), []kvmtest.Job{
		{Package: "manager", What: "an image of layers by Firecracker", Flags: []string{"-run=^TestImageByFirecracker$"}, Needs: firecracker},
		{
			Package: "internal/vmm/qemu", What: "microvm",
			Flags: conformance("microvm on KVM", "machine", "console", "clock", "channel", "drives", "network",
				"power-off", "crash", "kill", "pause", "save", "save with disks", "restore fails"),
		},
		{
			Package: "internal/vmm/qemu", What: "q35",
			Flags: conformance("q35 on KVM", "machine", "clock", "pause", "save with disks"),
		},
		{
			Package: "internal/vmm/firecracker", What: "plain",
			Flags: conformance("plain", own...), Needs: firecracker, AsUser: true, Timeout: 40 * time.Minute,
		},
		{
			Package: "internal/vmm/firecracker", What: "with devices of root's",
			Flags: conformance("plain", "network by TAP", "block device"), Needs: firecracker,
			MaySkip: []string{"TestConformance/plain/block_device"}, // there may be no loop devices
		},
		{
			Package: "internal/vmm/firecracker", What: "in its jail",
			Flags: conformance("in its jail", "leaves nothing open", "dies with its parent", "drives", "network",
				"power-off", "crash", "kill a VMM that hangs", "save", "save with raw disks", "save fails", "restore fails"),
			Needs: jailer,
		},
	}...)
}

// engineJobs returns the jobs of the engine as a whole on KVM, which make test runs: the probe,
// all that users do with VMs, by each backend, and a run by the command line. The others are the
// suites of the backends.
func engineJobs(firecracker, jailer []string) []kvmtest.Job {
	return []kvmtest.Job{
		{Package: "internal/host", Flags: []string{"-run=^(TestAcceleratorOfThisHost|TestAcceleratorCancelled|TestProbe.*)$"}},
		{Package: "internal/host", Flags: []string{"-run=^(TestAcceleratorOfThisHost|TestProbe)$"}, AsUser: true},
		{Package: "manager", What: "by QEMU", Flags: []string{"-run=^TestOnKVM$/^qemu$"}},
		{Package: "manager", What: "by Firecracker", Flags: []string{"-run=^TestOnKVM$/^firecracker$"}, Needs: firecracker},
		{Package: "manager", What: "on TAP by Firecracker", Flags: []string{"-run=^TestTAPByFirecracker$"}, Needs: firecracker},
		{Package: "internal/cli", What: "by Firecracker", Flags: []string{"-run=^TestRunByFirecracker$"}, Needs: jailer},
		{Package: "internal/cli", What: "by Firecracker", Flags: []string{"-run=^TestRunByFirecracker$"}, Needs: firecracker, AsUser: true},
	}
}
