package wire

// WorkspaceChannel is the channel type for a guest that is a workspace: commands run in it one
// after the other, and what each has changed can be had as a layer. Its open request carries a
// [WorkspaceRequest] as JSON. The channel behaves as one of [ExecChannel] does: a step's data
// are those of its command; with Layer the archive is the output, and with Put it is the input.
// What fails is said on stderr, with an exit status that is not zero.
const WorkspaceChannel = "workspace@smolvm"

// WorkspaceRequest asks a workspace for one thing; exactly one of the pointers is set.
type WorkspaceRequest struct {
	// Exec is the command of a step, and who runs it; nothing else asks for one.
	Exec ExecRequest `json:"exec"`

	// Step runs a command in a root file system that is the guest's with all that steps have
	// changed. All processes that it leaves behind are ended.
	Step *StepRequest `json:"step,omitempty"`
	// Layer sends what has changed since the last layer, and begins another one.
	Layer *LayerRequest `json:"layer,omitempty"`
	// Put takes an archive.
	Put *PutRequest `json:"put,omitempty"`
	// Root sends the guest's own root file system.
	Root *RootRequest `json:"root,omitempty"`
	// Overlay sends what has changed in a directory of the host whose changes are kept apart, under
	// the name of [Mount].Overlay.
	Overlay string `json:"overlay,omitempty"`
}

// StepRequest says how a step's command runs.
type StepRequest struct {
	// NoNetwork leaves the command nothing but loopback.
	NoNetwork bool `json:"no_network,omitempty"`
	// Mounts are made in this order.
	Mounts []StepMount `json:"mounts,omitempty"`
}

// StepMount is a directory or a file that only one step sees.
type StepMount struct {
	// Area names the area, as in [PutRequest], that is mounted. Empty: an empty file system in
	// memory is.
	Area string `json:"area,omitempty"`
	// Source is a path in the area. Empty: all of it.
	Source []byte `json:"source,omitempty"`
	// Target is a path in the step's root. It is made, and not part of a layer if it is empty
	// afterwards.
	Target   []byte `json:"target"`
	ReadOnly bool   `json:"read_only,omitempty"`
	// Size bounds a file system in memory, in bytes. Zero: half of the memory.
	Size int64 `json:"size,omitempty"`
}

// LayerRequest says what is sent.
type LayerRequest struct {
	// Area sends that area instead, which stays as it is.
	Area string `json:"area,omitempty"`
	// Discard sends nothing, and begins another layer.
	Discard bool `json:"discard,omitempty"`
}

// PutRequest says where an archive goes.
type PutRequest struct {
	// Area is the name, of a-z, 0-9 and hyphens, of an area beside the root file system, which
	// is made if it is not there. Empty: the root file system.
	Area string `json:"area,omitempty"`
	// Memory keeps the area in memory, and never on a disk.
	Memory bool `json:"memory,omitempty"`
	// Drop removes the area instead.
	Drop bool `json:"drop,omitempty"`
	// Path is a directory, which is made if it is not there. Empty: the root.
	Path []byte `json:"path,omitempty"`
}

// RootRequest asks for a guest's own root file system, without what is mounted in it and what
// the agent writes there. The input is what layers of its image have, as layertar.ReadBase reads
// it: only what differs is sent.
type RootRequest struct {
	// Pause holds all that was started over the guest channel and by SSH meanwhile.
	Pause bool `json:"pause,omitempty"`
}
