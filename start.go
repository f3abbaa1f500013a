package smolvm

import (
	"encoding/json"
	"time"
)

// Rung is the way in which a VM was started. The faster ones are tried first; one that
// can't be had falls back to the next.
type Rung string

// The rungs, the fastest first.
const (
	// RungPool is a VM that was running already, held, and took on its identity.
	RungPool Rung = "pool"
	// RungClone is a clone of a template: a frozen VM of the same kind.
	RungClone Rung = "clone"
	// RungSnapshot is a guest that goes on where a snapshot was taken.
	RungSnapshot Rung = "snapshot"
	// RungCold is a boot from the beginning.
	RungCold Rung = "cold boot"
)

// StartReport says how a VM was started.
type StartReport struct {
	Rung Rung `json:"rung"`
	// Source is the template or the snapshot that the guest came from.
	Source      string `json:"source,omitempty"`
	Backend     string `json:"backend"`
	Accelerator string `json:"accelerator"`
	// Timeline is what the start spent its time on.
	Timeline []Phase `json:"timeline"`
	// Warnings are what did not go as it should, and did no harm: above all, why a
	// faster rung could not be had.
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
	// Tasks is how many processes and threads it may have.
	Tasks int `json:"tasks,omitempty"`
	// Reason is why no control group is used.
	Reason string `json:"reason,omitempty"`
}

// Phase is a part of an operation, and how long it took.
type Phase struct {
	Name     string
	Duration time.Duration
}

type phaseJSON struct {
	Name string  `json:"name"`
	Ms   float64 `json:"ms"`
}

// MarshalJSON implements [json.Marshaler]; the duration is in milliseconds.
func (p Phase) MarshalJSON() ([]byte, error) {
	ms := float64(p.Duration.Round(10*time.Microsecond)) / float64(time.Millisecond)
	return json.Marshal(phaseJSON{Name: p.Name, Ms: ms})
}

// UnmarshalJSON implements [json.Unmarshaler].
func (p *Phase) UnmarshalJSON(text []byte) error {
	var j phaseJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*p = Phase{Name: j.Name, Duration: time.Duration(j.Ms * float64(time.Millisecond))}
	return nil
}

// Template is a frozen VM that others are cloned from.
type Template struct {
	ID string `json:"id"`
	// Image, VCPUs, MemoryMiB, DiskSizeMiB and WarmUp are what it is a template of.
	Image       string `json:"image"`
	VCPUs       int    `json:"vcpus"`
	MemoryMiB   int    `json:"memory_mib"`
	DiskSizeMiB int64  `json:"disk_size_mib,omitempty"`
	WarmUp      string `json:"warm_up,omitempty"`
	Backend     string `json:"backend"`
	Accelerator string `json:"accelerator"`
	// Stale says that no VM will be cloned from it any more, as the VMM, the host or
	// smolvm is another one since.
	Stale bool `json:"stale,omitempty"`
	// Size is what it takes on disk, in bytes.
	Size      int64     `json:"size"`
	CreatedAt time.Time `json:"created_at"`
	UsedAt    time.Time `json:"used_at"`
}

// Snapshot is a VM as it was at some moment: its memory, its devices, its disk.
type Snapshot struct {
	Name string `json:"name"`
	// VMID is the VM that it was taken of, and Config that VM's configuration.
	VMID   string   `json:"vm_id"`
	Config VMConfig `json:"config"`
	Image  string   `json:"image"`
	// Backend and Accelerator that it can be restored on with its memory.
	Backend     string `json:"backend"`
	Accelerator string `json:"accelerator"`
	// Pause is how long the VM was held while it was taken, in nanoseconds in JSON.
	Pause time.Duration `json:"pause_ns"`
	// Synced says that the guest's file systems had been written out before, so that
	// the disk alone is in order too.
	Synced bool `json:"synced"`
	// Size is what it takes on disk, in bytes.
	Size      int64     `json:"size"`
	CreatedAt time.Time `json:"created_at"`
}

// Pool is a number of VMs that are kept ready to be handed out.
type Pool struct {
	ID string `json:"id"`
	// Size is how many are to be ready, and Ready how many are.
	Size  int `json:"size"`
	Ready int `json:"ready"`
	// Image, VCPUs, MemoryMiB, DiskSizeMiB and WarmUp are what VMs of it are like.
	Image       string `json:"image"`
	VCPUs       int    `json:"vcpus"`
	MemoryMiB   int    `json:"memory_mib"`
	DiskSizeMiB int64  `json:"disk_size_mib,omitempty"`
	WarmUp      string `json:"warm_up,omitempty"`
}
