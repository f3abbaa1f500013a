package traits

import "github.com/smolvm/smolvm/internal/vmm"

// FirecrackerProgram is the name of Firecracker's program.
const FirecrackerProgram = "firecracker"

// Firecracker returns the traits of package firecracker.
func Firecracker() vmm.Traits {
	return vmm.Traits{
		Name:         "firecracker",
		DiskFormats:  []string{"raw"},
		Accelerators: []string{vmm.KVM},
		Layout:       1,
		Programs: []vmm.Program{{
			Names:      []string{FirecrackerProgram},
			MinVersion: "1.7", // as package api of the backend has it
			Why:        "runs the VMs",
		}},
	}
}
