package smolvm

import (
	"net/netip"
	"time"
)

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
	// Image is the digest of the VM's image; empty for a VM made from paths.
	Image string `json:"image,omitempty"`
	// Backend runs the VM.
	Backend string `json:"backend"`
	// Accelerator the VM runs on, "kvm" or "tcg"; empty until its first start.
	Accelerator string `json:"accelerator,omitempty"`
	// PID of the VMM, and ShimPID of its shim; zero when the VM is not running.
	PID     int `json:"pid,omitempty"`
	ShimPID int `json:"shim_pid,omitempty"`
	// DiskPath is the VM's root disk.
	DiskPath string `json:"disk_path,omitempty"`
	// LogPath is the file that keeps the guest's serial console.
	LogPath string `json:"log_path,omitempty"`
	// SocketPath is the shim's control socket while the VM runs.
	SocketPath string `json:"socket_path,omitempty"`
	// Cause says why the VM stopped, failed, could not be started, or was paused by its
	// VMM, in words; empty while it runs.
	Cause string `json:"cause,omitempty"`
	// Start says how the VM was last started; nil in lists, and before its first start.
	Start *StartReport `json:"start,omitempty"`
	// Timeline is what the creation or start that returned this spent its time on.
	Timeline []Phase `json:"timeline,omitempty"`
	// CreatedAt, StartedAt and StoppedAt are in UTC; zero if it has not
	// happened yet.
	CreatedAt time.Time `json:"created_at"`
	StartedAt time.Time `json:"started_at,omitzero"`
	StoppedAt time.Time `json:"stopped_at,omitzero"`
}

// NetworkConfig is a VM's network: its lease, and what follows from it.
type NetworkConfig struct {
	// Mode is how the guest is connected.
	Mode NetworkMode `json:"mode"`
	// GuestIP is the guest's address; Gateway is the host's side of its network
	// and Prefix that network. In [NetworkUser] every VM has a network of its
	// own, so all of them have the same addresses.
	GuestIP netip.Addr   `json:"guest_ip"`
	Gateway netip.Addr   `json:"gateway"`
	Prefix  netip.Prefix `json:"prefix"`
	// GuestMAC is the hardware address of the guest's interface.
	GuestMAC string `json:"guest_mac"`
	// SSHHostAddr and SSHHostPort forward to the guest's port 22 while the VM
	// runs.
	SSHHostAddr netip.Addr `json:"ssh_host_addr"`
	SSHHostPort int        `json:"ssh_host_port,omitempty"`
	// PortForwards are the forwards in force, or that a start will set up.
	PortForwards []PortForward `json:"port_forwards,omitempty"`
}

// NetworkMode is a way to connect a guest.
type NetworkMode string

// NetworkUser connects the guest by a user-space TCP/IP stack in the VM's
// shim. It needs no privilege.
const NetworkUser NetworkMode = "user"

// Event is one thing that happened to a VM, as kept in the state database.
type Event struct {
	ID   int64  `json:"id"`
	VMID string `json:"vm_id"`
	// Actor is the process that did it, as "smolvm[pid]" or "shim[pid]".
	Actor string `json:"actor"`
	// Action is what was done: "create", "start", "stop", "exit", ...
	Action string    `json:"action"`
	At     time.Time `json:"at"`
	// Duration is how long it took, in nanoseconds in JSON.
	Duration time.Duration `json:"duration_ns"`
	// Detail says more, in words: the cause of an exit, the error of a start.
	Detail string `json:"detail,omitempty"`
}

// Image is an immutable set of kernel, initramfs, root file system and
// defaults, kept by digest.
type Image struct {
	// Digest is "sha256:" and 64 hexadecimal digits over the image's recipe
	// and content.
	Digest string `json:"digest"`
	// Names point to the image; a newer build of a name takes it over.
	Names []string `json:"names"`
	// KernelPath, InitrdPath and RootfsPath are files in the image store.
	KernelPath string `json:"kernel_path"`
	InitrdPath string `json:"initrd_path"`
	RootfsPath string `json:"rootfs_path"`
	// SmallRootfsPath holds the same files in a small file system, for VMs whose disk is
	// to be smaller than RootfsPath's; empty if there is none.
	SmallRootfsPath string `json:"small_rootfs_path,omitempty"`
	// BootArgs are the image's default kernel arguments.
	BootArgs string `json:"boot_args"`
	// Arch is the image's architecture as Go names it, as in "amd64".
	Arch string `json:"arch"`
	// Source tells in words what the image was made from.
	Source string `json:"source"`
	// Size is the space the image takes on disk, in bytes.
	Size int64 `json:"size"`
	// CreatedAt is when it was built, in UTC.
	CreatedAt time.Time `json:"created_at"`
}
