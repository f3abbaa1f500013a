package smolvm

import "time"

// StartMethod is how a VM was started. Faster methods are tried first; each falls back to
// the next.
type StartMethod string

// The methods of starting a VM, the fastest first.
const (
	// StartPool is a paused VM from a pool that was given this VM's identity.
	StartPool StartMethod = "pool"
	// StartClone is a clone of a template: a saved VM of the same kind.
	StartClone StartMethod = "clone"
	// StartSnapshot is a guest that was restored from a snapshot.
	StartSnapshot StartMethod = "snapshot"
	// StartBoot is a boot from the beginning.
	StartBoot StartMethod = "boot"
)

// StartReport says how a VM was started.
type StartReport struct {
	Method StartMethod `json:"method"`
	// Source is the template or the snapshot that the guest came from.
	Source      string `json:"source,omitempty"`
	Backend     string `json:"backend"`
	Accelerator string `json:"accelerator"`
	// Timeline is what the start spent its time on.
	Timeline []Phase `json:"timeline"`
	// Warnings are what did not go as it should, and did no harm: above all, why a
	// faster method could not be used.
	Warnings []string `json:"warnings,omitempty"`
	// Limits are what the host lets the VM take.
	Limits Limits `json:"limits,omitzero"`
	// Verified names the parts of the guest's identity that were read back from the
	// guest and found to be what they should be, or such as no other VM has.
	Verified []string `json:"verified,omitempty"`
}

// Limits are the ceilings of what a VM's VMM takes of the host. Zero: none.
type Limits struct {
	// By is what enforces them: "cgroup v2", "cgroup v1", or "rlimit" where control
	// groups can't be used.
	By string `json:"by"`
	// Group is the control group's directory.
	Group string `json:"group,omitempty"`
	// MemoryMiB is that of the guest and what the VMM needs beside it. An rlimit counts
	// what is reserved, not what is used, so it is larger.
	MemoryMiB int `json:"memory_mib,omitempty"`
	// CPUs is how many processors' time it may take; see [VMConfig].CPULimit.
	CPUs float64 `json:"cpus,omitempty"`
	// DiskBytesPerSecond and DiskIOPS are as in [VMConfig]. The VMM enforces them itself,
	// whatever By says.
	DiskBytesPerSecond int64 `json:"disk_bytes_per_second,omitempty"`
	DiskIOPS           int64 `json:"disk_iops,omitempty"`
	// Tasks is how many processes and threads it may have.
	Tasks int `json:"tasks,omitempty"`
	// Reason is why no control group is used.
	Reason string `json:"reason,omitempty"`
}

// Phase is a part of an operation, and how long it took.
type Phase struct {
	Name     string        `json:"name"`
	Duration time.Duration `json:"-"` // "duration_ms"
}
