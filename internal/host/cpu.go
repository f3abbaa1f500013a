package host

import (
	"fmt"
	"os"
	"strings"
)

// NestedProblem returns why guests on an accelerator can't have virtualization, and what would
// mend it; empty: they can.
func (h *Host) NestedProblem(accelerator string) (problem, fix string) {
	if accelerator != KVM {
		return "", "" // it is emulated too
	}
	for _, module := range []string{"kvm_intel", "kvm_amd"} {
		switch strings.TrimSpace(h.read("sys/module/" + module + "/parameters/nested")) {
		case "Y", "1":
			return "", ""
		case "N", "0":
			return "the host's KVM does not pass virtualization on to guests",
				fmt.Sprintf("when no VM runs: `%s && %s`", h.sudo("modprobe -r "+module), h.sudo("modprobe "+module+" nested=1"))
		}
	}
	return "the host's KVM does not say that it passes virtualization on to guests", ""
}

// CPUModel names the host's processor, as far as the kernel tells.
func (h *Host) CPUModel() string {
	file, err := os.Open(h.path("/proc/cpuinfo"))
	if err != nil {
		return ""
	}
	defer func() { _ = file.Close() }()
	first := make([]byte, 4<<10) // of many processors, the first says it all
	n, _ := file.Read(first)
	for line := range strings.Lines(string(first[:n])) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "model name", "Model", "CPU part":
			return strings.TrimSpace(value)
		}
	}
	return ""
}
