package traits

import "github.com/smolvm/smolvm/internal/vmm"

// FirecrackerProgram is the name of Firecracker's program, and JailerProgram that of its jailer.
const (
	FirecrackerProgram = "firecracker"
	JailerProgram      = "jailer"
)

// getFirecracker is how to get both: distributions have no package of them.
const getFirecracker = "put `firecracker` and `jailer` of a release of https://github.com/firecracker-microvm/firecracker/releases into PATH"

// Firecracker returns the traits of package firecracker.
func Firecracker() vmm.Traits {
	return vmm.Traits{
		Name:         "firecracker",
		DiskFormats:  []string{"raw"},
		Accelerators: []string{vmm.KVM},
		Namespaces:   true,
		Layout:       1,
		Programs: []vmm.Program{{
			Names:      []string{FirecrackerProgram},
			MinVersion: "1.7", // as package api of the backend has it
			Why:        "runs the VMs",
			Get:        getFirecracker,
		}, {
			Names:    []string{JailerProgram},
			Why:      "runs Firecracker in a chroot, as a user of its own, when root starts a VM",
			Get:      getFirecracker,
			Optional: true,
		}},
	}
}
