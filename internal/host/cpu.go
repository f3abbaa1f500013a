package host

import (
	"os"
	"strings"
)

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
