package smolvm

import "time"

// VMState is where a VM is in its life.
//
//	           Start                Pause
//	created ----------> running <----------> paused
//	                      |   ^     Resume
//	     Stop, power off  |   | Start
//	                      v   |
//	                    stopped
//
// A VM whose guest fails to start, or whose VMM dies, is in [StateError]. It can be started
// again, from its disk. A start that fails before the guest runs leaves the state as it is.
type VMState string

// The states of a VM.
const (
	StateCreated VMState = "created"
	StateRunning VMState = "running"
	StatePaused  VMState = "paused"
	StateStopped VMState = "stopped"
	StateError   VMState = "error"
)

// States lists all the states, in the order of a VM's life.
func States() []VMState {
	return []VMState{StateCreated, StateRunning, StatePaused, StateStopped, StateError}
}

// Alive reports whether a VM in this state has a VMM process.
func (s VMState) Alive() bool { return s == StateRunning || s == StatePaused }

// VMInfo is what is known of a VM.
type VMInfo struct {
	// ID names the VM within its data directory.
	ID string `json:"id"`
	// State is the VM's state when it was looked up.
	State VMState `json:"state"`
	// Config is the configuration that the VM was created with, defaults
	// filled in.
	Config VMConfig `json:"config"`
	// Network is the VM's lease and how to reach the guest.
	Network NetworkConfig `json:"network"`
	// EgressRevision is that of the egress policy in Config; see [EgressState].
	EgressRevision int64 `json:"egress_revision,omitempty"`
	// Image is the digest of the VM's image; empty for a VM made from paths.
	Image string `json:"image,omitempty"`
	// Backend runs the VM.
	Backend string `json:"backend"`
	// Accelerator the VM runs on, "kvm" or "tcg"; empty until its first start.
	Accelerator string `json:"accelerator,omitempty"`
	// HostInfo is what only programs on the VM's host have a use for.
	HostInfo
	// Cause says why the VM stopped, failed, could not be started, or was paused by its
	// VMM, in words; empty while it runs, unless its agent can't be reached any more.
	Cause string `json:"cause,omitempty"`
	// Health is what the checks of its health have found; nil if none are made, or it does not run.
	Health *Health `json:"health,omitempty"`
	// Start says how the VM was last started; nil in lists, and before its first start.
	Start *StartReport `json:"start,omitempty"`
	// Timeline is what the creation that returned this spent its time on; nil in all else.
	// That of a start is in Start.
	Timeline []Phase `json:"timeline,omitempty"`
	// CreatedAt, StartedAt and StoppedAt are in UTC; zero if it has not
	// happened yet.
	CreatedAt time.Time `json:"created_at"`
	StartedAt time.Time `json:"started_at,omitzero"`
	StoppedAt time.Time `json:"stopped_at,omitzero"`
}

// HostInfo is where a VM is on its host. All of it is empty for a VM of another host.
type HostInfo struct {
	// PID of the VMM, and ShimPID of its shim; zero when the VM is not running.
	PID     int `json:"pid,omitempty"`
	ShimPID int `json:"shim_pid,omitempty"`
	// DiskPath is the VM's root disk.
	DiskPath string `json:"disk_path,omitempty"`
	// LogPath is the file that keeps the guest's serial console.
	LogPath string `json:"log_path,omitempty"`
	// SocketPath is the shim's control socket while the VM runs.
	SocketPath string `json:"socket_path,omitempty"`
}
