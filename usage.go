package smolvm

import "time"

// Usage is what a VM has taken of its host since its VMM was started; that of a clone or a
// restored VM counts from there.
type Usage struct {
	// CPUTime is the processors' time of the VMM, with the guest's in it.
	CPUTime time.Duration `json:"-"` // "cpu_time_ms"
	// Memory is what of the VMM is in the host's memory, with the guest's in it, in bytes. It
	// includes what the VMM shares with others, such as a template's memory.
	Memory int64 `json:"memory_bytes"`
	// Disk is what the guest has read and written, on all its disks and drives together; nil
	// if the VMM can't count it.
	Disk *DiskUsage `json:"disk,omitempty"`
	// Network is what has passed over the guest's network interface; nil if it has none.
	Network *NetworkUsage `json:"network,omitempty"`
}

// DiskUsage is what a guest has done with its disks.
type DiskUsage struct {
	Read    int64 `json:"read_bytes"`
	Written int64 `json:"written_bytes"`
	// Reads and Writes are how many times.
	Reads  int64 `json:"reads"`
	Writes int64 `json:"writes"`
}

// NetworkUsage is what has passed over a guest's network interface, as whole frames.
type NetworkUsage struct {
	Received int64 `json:"received_bytes"`
	Sent     int64 `json:"sent_bytes"`
}
