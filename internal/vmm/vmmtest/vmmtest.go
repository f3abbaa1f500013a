// Package vmmtest checks that a [vmm.Backend] keeps its contract. Every backend's
// own tests run it; what is peculiar to one VMM is tested there.
//
// The guest is a kernel and an initramfs whose init does what the test tells it
// over the guest channel, so a test reads as a conversation. Paths hold commas,
// spaces and equals signs, which VMMs like to give a meaning.
package vmmtest

import (
	"testing"

	"github.com/smolvm/smolvm/internal/vmm"
)

// Assets are what guests are made of.
type Assets struct {
	// Kernel is an ELF kernel.
	Kernel string
	// Initrd makes an initramfs whose init, a shell with busybox's programs in
	// PATH, runs the script when /proc, /sys and /dev are mounted and the modules
	// of all virtio devices are loaded. Where the guest channel is vsock, the test's program
	// is at [RelayProgram].
	Initrd func(t testing.TB, script string) string
	// Accelerator is [vmm.KVM] or [vmm.TCG].
	Accelerator string
	// BootArgs are the kernel's arguments, without those of the console.
	BootArgs string
	// ConsoleBytes is the limit of a console's log that the backend was told to keep.
	ConsoleBytes int64
	// SkipClock says why the guest's clock is not tested. Empty: it is.
	SkipClock string
	// Traits are those of the backend. Zero: package traits lists them.
	Traits vmm.Traits
	// SkipLink says why network interfaces that are links are not tested. Empty: they are.
	SkipLink string
	// NoMTU reports that network interfaces can't offer an MTU to the guest.
	NoMTU bool
	// SkipTAP says why network interfaces that are TAPs are not tested. Empty: they are.
	SkipTAP string
	// SkipDevice says why drives that are block devices are not tested. Empty: they are.
	SkipDevice string
	// BusySaves is how often each busy guest is saved. Zero: busy guests are left out.
	BusySaves int
	// CheckSave checks what is reported of each save of a busy guest. Nil: that the
	// guest was not held early, as the VMM's memory can be read.
	CheckSave func(vmm.Saved) error
}

// Run runs the suite. Each case starts VMs of its own, on a backend of its own.
func Run(t *testing.T, newBackend func(testing.TB) vmm.Backend, assets Assets) {
	initrd := assets.Initrd(t, obey)
	cases := []struct {
		name string
		run  func(*kit)
		// alone is for cases that count what this whole process has open.
		alone bool
	}{
		{"leaves nothing open", leavesNothing, true},
		{"start fails", startFails, true},
		{"bad network interface", badNIC, true},
		{"dies with its parent", diesWithParent, true},

		{"machine", machine, false},
		{"console", console, false},
		{"console floods", consoleFloods, false},
		{"clock", clock, false},
		{"channel", channel, false},
		{"no channel", noChannel, false},
		{"channel opened again", channelAgain, false},
		{"drives", drives, false},
		{"shared drive", sharedDrive, false},
		{"block device", blockDevice, false},
		{"network", network, false},
		{"network by TAP", tap, false},

		{"power-off", powerOff, false},
		{"reboot", reboot, false},
		{"panic", kernelPanic, false},
		{"crash", crash, false},
		{"kill", kill, false},
		{"kill at once", killAtOnce, false},
		{"kill a VMM that hangs", killHung, false},
		{"shutdown", shutdown, false},
		{"pause", pause, false},

		{"save", save, false},
		{"save resets the channel", channelReset, false},
		{"save with disks", saveDisks, false},
		{"save with raw disks", saveRawDisks, false},
		{"overlays fail", overlaysFail, false},
		{"save a guest that is held", saveHeld, false},
		{"save a busy guest with 2 CPUs", saveBusy(2), false},
		{"save a busy guest with 4 CPUs", saveBusy(4), false},
		{"save fails", saveFails, true},
		{"restore fails", restoreFails, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if !c.alone {
				t.Parallel()
			}
			c.run(newKit(t, newBackend(t), assets, initrd))
		})
	}
}

// SaveBusy runs one case of the suite: a busy guest with 2 CPUs is saved.
func SaveBusy(t *testing.T, backend vmm.Backend, assets Assets) {
	saveBusy(2)(newKit(t, backend, assets, assets.Initrd(t, obey)))
}
