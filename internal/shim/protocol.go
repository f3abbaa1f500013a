package shim

import (
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network"
)

// Protocol is the number of what shims and their clients say to each other. See package
// compat.
const Protocol = 1

// OrderProtocol is the highest number of an order or a claim that this build's shims know.
// Most have [Protocol]. One for a network in another mode than user has 2: a shim from
// before there were modes would ignore the mode, and connect the guest in another way than
// it was asked to. One with an egress policy has 3: a shim from before there were any would
// let everything out. One for the user network with a rate has 4: a shim from before would not
// keep it. One with secrets has 5: a shim from before there were any would give the guest no
// placeholders. One with mounts has 6: a shim from before there were any would leave them out.
// One with checks of the guest's health has 7: a shim from before there were any would make none.
const OrderProtocol = 7

// Operations of the control socket. A connection carries one request and one
// response, a line of JSON each; after a successful dial it is the connection.
const (
	OpStatus        = "status"
	OpStop          = "stop"
	OpAddForward    = "add-forward"
	OpRemoveForward = "remove-forward"
	OpPause         = "pause"
	OpResume        = "resume"
	OpSave          = "save"
	OpDial          = "dial"
	OpSetEgress     = "set-egress"
	OpUsage         = "usage"
)

// Request is what a client asks, as a line of JSON. Which fields count depends on Op.
type Request struct {
	Op      string        `json:"op"`
	Grace   time.Duration `json:"grace_ns,omitempty"`
	Patient bool          `json:"patient,omitempty"`
	Signal  int           `json:"signal,omitempty"`
	Forward Forward       `json:"forward,omitzero"`
	Port    int           `json:"port,omitempty"`
	Save    *Save         `json:"save,omitempty"`

	Egress *network.Egress `json:"egress,omitempty"`
}

// Response is the answer to a [Request], as a line of JSON.
type Response struct {
	Failure *Failure `json:"failure,omitempty"`
	Forward Forward  `json:"forward,omitzero"`
	Status  *Status  `json:"status,omitempty"`
	Saved   Saved    `json:"saved,omitzero"`

	Usage *smolvm.Usage `json:"usage,omitempty"`
}

// Status is what a shim says of its VM.
type Status struct {
	// Protocol is the shim's [Protocol]. Zero: from before it was told.
	Protocol int `json:"protocol,omitempty"`

	ID     string `json:"id"`
	Run    string `json:"run"`
	PID    int    `json:"pid"` // of the shim
	VMMPID int    `json:"vmm_pid"`
	// Uptime is the time since the shim was started.
	Uptime   time.Duration `json:"uptime_ns"`
	Forwards []Forward     `json:"forwards"`
	// EgressRevision is that of the egress policy in force; 0: there is none.
	EgressRevision int64 `json:"egress_revision,omitempty"`
	// Halt is why the VMM has paused the guest by itself; empty if it has not.
	Halt string `json:"halt,omitempty"`
	// Health is what the checks of the guest's health have found; nil: none are made.
	Health *smolvm.Health `json:"health,omitempty"`
	// Answer is the agent's, if there is one.
	Answer *wire.Answer `json:"answer,omitempty"`
	// Unreachable is why the guest's agent can't be reached although the guest runs; empty
	// if it can.
	Unreachable string `json:"unreachable,omitempty"`
	// ChannelEnd is how the guest channel was last ended without the VM; nil: it never was.
	ChannelEnd *ChannelEnd `json:"channel_end,omitempty"`
}

// ChannelEnd is the end of a guest channel, which has ended all calls that went over it.
type ChannelEnd struct {
	At time.Time `json:"at"`
	// Why is why it was ended, in words.
	Why string `json:"why"`
}

// Stop says how to stop a VM.
type Stop struct {
	// Grace is how long the guest may take to shut down. Zero: it is ended at once.
	Grace time.Duration
	// Patient gives the guest all of that time, even if it shows no sign of having
	// been asked.
	Patient bool
	// Signal is what the guest's processes get. Zero: SIGTERM, and SIGHUP for shells.
	Signal int
}

// Save says how to save a guest.
type Save struct {
	// Memory and State are the files to make.
	Memory string `json:"memory"`
	State  string `json:"state"`
	// Drives are those that get an overlay when the guest has been saved, or of which a copy
	// is made.
	Drives []SavedDrive `json:"drives,omitempty"`
}

// SavedDrive is a drive whose file is not to change any more when the guest has been
// saved, or of which a copy is made as it is then. A shim from before there were copies refuses
// to make one, as it finds no Layer.
type SavedDrive struct {
	// Number of the drive.
	Number int `json:"number"`
	// Copy is the path of the copy to be made of the drive's file at Path, which is raw. Layer
	// and Overlay are empty then. Empty: none.
	Copy string `json:"copy,omitempty"`
	// Layer is another name of the drive's file, which it keeps.
	Layer string `json:"layer"`
	// Overlay is an empty overlay of it that the guest writes to from then on. It
	// takes the name Path, which the drive's file has had. If the guest goes on without
	// it, it is removed: whoever asked for it may be gone by then.
	Overlay string `json:"overlay"`
	Path    string `json:"path"`
}

// Saved says how it went.
type Saved struct {
	Pause time.Duration `json:"pause_ns"`
	Held  bool          `json:"held,omitempty"` // as in [vmm.Saved]
	// Synced is false if the guest's file systems were not written out before, so
	// that a disk without its memory is as after a power cut.
	Synced bool `json:"synced"`
}
