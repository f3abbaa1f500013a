package smolvm

import "time"

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
	// Pause is how long the VM was held while it was taken.
	Pause time.Duration `json:"-"` // "pause_ms"
	// Synced says that the guest's file systems had been written out before, so that
	// the disk alone is in order too.
	Synced bool `json:"synced"`
	// Size is what it takes on disk, in bytes.
	Size      int64     `json:"size_bytes"`
	CreatedAt time.Time `json:"created_at"`
}

// SnapshotOptions are the options of [Snapshots.CreateSnapshot].
type SnapshotOptions struct {
	// Name of the snapshot, like a VM's id. Empty: the VM's id and the time.
	Name string
}

// RestoreOptions are the options of [Snapshots.RestoreSnapshot].
type RestoreOptions struct {
	// ID of the VM. Empty: that of the VM which the snapshot was taken of, if there
	// is none of that id any more, else a new one.
	ID string
	// InPlace has the VM which the snapshot was taken of go back to it, instead of making
	// another. That VM must not run. It has the CPUs, the memory and the disks of then;
	// what its disk has held since is lost. Its ports, labels and the rest of its
	// configuration stay.
	InPlace bool
	// Ephemeral as in [VMConfig].
	Ephemeral bool
	// Egress is the VM's egress policy, which must be within that of the snapshot. Nil: the
	// snapshot's own. It can't be given with InPlace.
	Egress *EgressPolicy
	// WithoutSecrets makes a VM that has none of the secrets. It can't be given with InPlace.
	WithoutSecrets bool
	// Start says how to start it. Cold boots from the snapshot's disk.
	Start StartOptions
	// AllowCold has the VM boot from the snapshot's disk if its memory can't be used, with
	// a warning.
	AllowCold bool
}

// ForkOptions are the options of [Snapshots.Fork].
type ForkOptions struct {
	// Count is how many children to make. Zero: one.
	Count int
	// IDs of the children. Those that are not given are made up.
	IDs []string
	// Egress is the children's egress policy, which must be within the parent's. Nil: the
	// parent's own.
	Egress *EgressPolicy
	// WithoutSecrets makes children that have none of the parent's secrets. They go on with
	// placeholders in their memory, which are worth nothing.
	WithoutSecrets bool
	// Start says how to start them. Cold boots them from the disk as it is now.
	Start StartOptions
	// AllowCold has a child boot from the disk if it can't go on where the parent is, with
	// a warning.
	AllowCold bool
}

// Forked is what came of a fork.
type Forked struct {
	// Pause is how long the parent was held.
	Pause    time.Duration `json:"-"` // "pause_ms"
	Children []VMInfo      `json:"children"`
}
