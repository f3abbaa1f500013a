package traits

import (
	"runtime"

	"github.com/smolvm/smolvm/internal/vmm"
)

// QEMU returns the traits of package qemu.
func QEMU() vmm.Traits {
	return vmm.Traits{
		Name:         "qemu",
		DiskFormats:  []string{"qcow2", "raw"},
		Accelerators: []string{vmm.KVM, vmm.TCG},
		Nested:       runtime.GOARCH == "amd64",
		MaxMTU:       65535, // its buffers have room for that (NET_BUFSIZE), and its device cuts nothing
		Layout:       3,
		Programs: []vmm.Program{{
			Names:      []string{QEMUProgram(runtime.GOARCH)},
			MinVersion: "6.0", // the first with all the options that we use
			Why:        "runs the VMs",
			Packages:   qemuPackages(runtime.GOARCH),
		}},
	}
}

// QEMUProgram is the name of QEMU's program for an architecture as Go names it.
func QEMUProgram(arch string) string {
	return "qemu-system-" + map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch]
}

func qemuPackages(arch string) map[string]string {
	packages := map[string]string{"apt": "qemu-system-x86", "dnf": "qemu-system-x86-core", "zypper": "qemu-x86", "pacman": "qemu-system-x86", "apk": "qemu-system-x86_64"}
	if arch == "arm64" {
		packages = map[string]string{"apt": "qemu-system-arm", "dnf": "qemu-system-aarch64-core", "zypper": "qemu-arm", "pacman": "qemu-system-aarch64", "apk": "qemu-system-aarch64"}
	}
	return packages
}
