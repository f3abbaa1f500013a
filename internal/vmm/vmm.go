// Package vmm is the contract between smolvm and the programs that run VMs, the VMMs.
//
// A [Backend] adapts one VMM. It is immutable: everything of one VM is in the
// [Instance] that Start returns. Backends run in the VM's shim, which stays the VMM's
// parent for as long as it lives; a backend must see to it that the VMM dies with the
// process that started it. What others need to know of a backend are its [Traits].
//
// Abilities that not every VMM has are interfaces, found by type assertion on an
// Instance: a backend that lacks one has no method for it. How a guest is saved is told
// at [Saver]. What every backend does is checked by package vmmtest.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
)

// Accelerators.
const (
	KVM = "kvm" // hardware virtualization
	TCG = "tcg" // emulation in software, on any host
)

// Traits are what a backend declares of itself, for those who don't run it. Package traits
// lists them.
type Traits struct {
	// Name of the backend.
	Name string
	// DiskFormats lists the formats of disks that it can use, best first. VMs' own disks are
	// of the first, which once released stays the first.
	DiskFormats []string
	// Accelerators lists what it can run VMs on, best first: [KVM], [TCG].
	Accelerators []string
	// Nested reports whether guests can be given a CPU with virtualization, where the
	// accelerator has it. Others never have one.
	Nested bool
	// MaxMTU is the longest packet of a guest's that it carries over a link, in bytes. Zero:
	// 1500.
	MaxMTU int
	// Namespaces reports whether a VMM whose VM has a network runs in namespaces of its own.
	Namespaces bool
	// Layout is the version of the devices, and of the CPU, that the backend gives to VMs. It grows when
	// they change, or their order does: guests that were saved before can't be restored.
	Layout int
	// Programs lists the programs that it needs on the host, the VMM first.
	Programs []Program
}

// Program is a program that a backend needs.
type Program struct {
	// Names are alternatives, any one of which will do.
	Names []string
	// MinVersion is the oldest version that works. Empty: any.
	MinVersion string
	// Why is what the program does for VMs, in words.
	Why string
	// Packages names the package that holds it, by package manager ("apt", "dnf",
	// "pacman", "apk", "zypper").
	Packages map[string]string
	// Get says how to get the program where no package has it, as a clause. Empty: one has.
	Get string
	// Optional programs make things better; the backend works without them.
	Optional bool
}

// ChannelPort is the name of the guest channel's virtio-serial port.
const ChannelPort = "smolvm.agent"

// A backend whose guest channel is vsock adds the kernel's argument
// "[ChannelVsockArg]=[ChannelVsockPort]" behind those of [Config]. The guest's agent then
// listens on that port for connections of the host, and for no virtio-serial port.
const (
	ChannelVsockArg  = "smolvm.vsock"
	ChannelVsockPort = 1024
)

// Config is all that a backend needs to start one VM. It is plain data, so that
// it can cross from the manager's process to the shim's.
type Config struct {
	// ID names the VM in messages and in the VMM's process list.
	ID string `json:"id"`
	// Binary is the VMM program. Empty: the backend looks in PATH.
	Binary string `json:"binary,omitempty"`
	// Accelerator is one of the backend's [Traits].
	Accelerator string `json:"accelerator"`
	VCPUs       int    `json:"vcpus"`
	MemoryMiB   int    `json:"memory_mib"`
	// Nested gives the guest a CPU with virtualization; see Nested of [Traits].
	Nested bool `json:"nested,omitempty"`

	Kernel string `json:"kernel"`
	Initrd string `json:"initrd,omitempty"`
	// BootArgs are the kernel's arguments. A backend adds what its machine
	// needs, and drops what would keep a guest from booting on it.
	BootArgs string `json:"boot_args"`

	// Drives in order; the first becomes /dev/vda. Their files are opened by Start: they may
	// get other names, or none, while the VM runs.
	Drives []Drive `json:"drives,omitempty"`
	// NIC is the guest's network interface; nil: none. Start fails if it is not valid.
	NIC *NIC `json:"nic,omitempty"`
	// Channel asks for a guest channel; see [Instance.OpenChannel].
	Channel bool `json:"channel"`

	// CPULimit is how many processors' time the VMM may take. Zero: as much as there is.
	// Start fails if the backend can't enforce it.
	CPULimit float64 `json:"cpu_limit,omitempty"`

	// DiskLimit bounds the speed of all drives together.
	DiskLimit DiskLimit `json:"disk_limit,omitzero"`

	// WorkDir is a directory that is there, in which a backend keeps what it needs while its
	// VMM runs, and nothing after that. It may be renamed meanwhile.
	WorkDir string `json:"work_dir,omitempty"`

	// Restore has the guest go on where a [Saver] saved it, instead of booting. All else
	// must be as it was then, except ID, paths, and the contents of drives that were not
	// saved with it.
	Restore *Restore `json:"restore,omitempty"`

	// ConsolePath is the log to which the guest's serial console is appended, and
	// LogPath that of the VMM's own output; see package ring. Both may be renamed while
	// the VM runs.
	ConsolePath string `json:"console_path"`
	LogPath     string `json:"log_path"`
}

// Drive is one disk. A backend opens the files that are named here, by the formats that
// are declared here, and no others: what a file holds may have been written by a guest.
type Drive struct {
	Path     string `json:"path"`
	Format   string `json:"format"` // "raw" or "qcow2"
	ReadOnly bool   `json:"read_only,omitempty"`
	// Device reports whether Path is a block device. It is a regular file otherwise.
	Device bool `json:"device,omitempty"`
	// Backing are the files that the disk is based on, the nearest first, whatever its
	// header says. They are only read.
	Backing []DiskFile `json:"backing,omitempty"`
}

// DiskFile is one file of a disk's chain. The fields are as in [Drive].
type DiskFile struct {
	Path   string `json:"path"`
	Format string `json:"format"`
	Device bool   `json:"device,omitempty"`
}

// DiskLimit is how much a guest may do with its drives in a second, reads and writes
// together. Zero: as much as there is.
type DiskLimit struct {
	BytesPerSecond int64 `json:"bytes_per_second,omitempty"`
	IOPS           int64 `json:"iops,omitempty"`
}

// Restore is a saved guest.
type Restore struct {
	// Memory and State are the files that [Saver] made. Neither is changed: what the
	// guest writes to its memory stays its own.
	Memory string `json:"memory"`
	State  string `json:"state"`
	// Held is that of [Saved].
	Held bool `json:"held,omitempty"`
}

// Backend starts VMs.
type Backend interface {
	// Name is that of the backend's [Traits].
	Name() string
	// Start starts the VMM and returns when the guest's CPUs run. ctx bounds
	// only the call: the VM lives on when it is done or cancelled after that.
	// On failure nothing is left running, and the error quotes what the VMM
	// printed.
	Start(ctx context.Context, cfg Config) (Instance, error)
}

// Channel is the host's end of a guest channel: a stream of bytes in each direction. Close
// ends reads and writes that wait, and so does the end of the VMM.
type Channel interface {
	io.ReadWriteCloser
	// SetReadDeadline and SetWriteDeadline as of [net.Conn].
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
}

// ErrChannelTaken is the error of a guest channel that is open, or that was and can't be
// opened again.
var ErrChannelTaken = errors.New("the guest channel was opened before")

// Instance is one running VM. All methods may be called at any time, from any
// goroutine, and again.
type Instance interface {
	// PID returns the id of the VMM's process.
	PID() int
	// OpenChannel opens the guest channel. The caller owns what it returns, and closes it.
	// ctx bounds the call only, which may wait until the guest listens; a backend that does
	// not wait keeps what is written until the guest reads it. A call that fails has
	// opened nothing. The error matches [smolvm.ErrUnsupported] if [Config] asked for no
	// channel, and [ErrChannelTaken] while one is open.
	//
	// Once that is closed, or the VMM has reset it, the channel may be opened again by a
	// backend that connects for each call (Firecracker's vsock). One whose channel is a
	// single stream for as long as the VMM runs (QEMU's port) returns ErrChannelTaken.
	//
	// A restored guest's channel is a new one at the host's end. The guest's end may have
	// been reset, or be in the middle of the session in which the guest was saved, with the
	// rest of that still to be read. So a caller begins with what the guest's agent
	// understands in any state; see Reset of package agent.
	OpenChannel(ctx context.Context) (Channel, error)
	// Done is closed when the VMM has ended and has been reaped.
	Done() <-chan struct{}
	// Exit returns how the VMM ended. It may be called only after Done is closed.
	Exit() Exit
	// Shutdown asks the guest's firmware or kernel to power off (ACPI power
	// button or the like), and returns at once. Nothing happens if the guest
	// does not listen.
	Shutdown(ctx context.Context) error
	// Kill ends the VMM: first by asking it to quit, then, when ctx is done or
	// it does not follow, by SIGKILL. It returns when the VMM has been reaped;
	// a VMM that has already ended is a success.
	Kill(ctx context.Context) error
}

// ExitReason is why a VM ended.
type ExitReason string

// Why a VM ended.
const (
	ExitPowerOff ExitReason = "power-off" // the guest powered off
	ExitReboot   ExitReason = "reboot"    // the guest reset itself; we don't reboot
	ExitPanic    ExitReason = "panic"     // the guest's kernel panicked
	ExitKilled   ExitReason = "killed"    // by Kill
	ExitCrashed  ExitReason = "crashed"   // the VMM ended by itself
)

// Exit is how a VM ended.
type Exit struct {
	Reason ExitReason `json:"reason"`
	// Detail is more of it, in words: the VMM's exit status, the panic's message.
	Detail string    `json:"detail,omitempty"`
	At     time.Time `json:"at"`
}

// Clean reports whether the VM ended in an orderly way.
func (e Exit) Clean() bool {
	return e.Reason == ExitPowerOff || e.Reason == ExitReboot || e.Reason == ExitKilled
}

func (e Exit) String() string {
	words := map[ExitReason]string{
		ExitPowerOff: "the guest powered off",
		ExitReboot:   "the guest rebooted, which ends a VM",
		ExitPanic:    "the guest's kernel panicked",
		ExitKilled:   "the VMM was ended by smolvm",
		ExitCrashed:  "the VMM ended unexpectedly",
	}[e.Reason]
	if e.Detail != "" {
		words += ": " + e.Detail
	}
	return words
}

// Consoler is an Instance that keeps the guest's console.
type Consoler interface {
	// ConsoleTail returns the end of what the guest has printed in this run, at most n
	// bytes. It is complete when the VMM has ended.
	ConsoleTail(n int) string
}

// Limiter is an Instance whose VMM is bounded in what it takes of the host.
type Limiter interface {
	// Limits returns what is bounded, and by what.
	Limits() smolvm.Limits
	// SetCPULimit changes CPULimit of [Config]. The error matches [smolvm.ErrUnsupported]
	// if this host can't enforce it.
	SetCPULimit(ctx context.Context, cpus float64) error
}

// DiskLimiter is an Instance that bounds the speed of its drives. What is in force is part
// of [Limiter]'s Limits.
type DiskLimiter interface {
	// SetDiskLimit changes DiskLimit of [Config].
	SetDiskLimit(ctx context.Context, limit DiskLimit) error
}

// Meter is an Instance whose VMM counts what the guest does with its drives.
type Meter interface {
	// DiskUsage returns what the guest has read and written on all its drives since the VMM was
	// started.
	DiskUsage(ctx context.Context) (smolvm.DiskUsage, error)
}

// Pauser is an Instance whose guest can be paused. Calls wait for the end of a [Hold].
type Pauser interface {
	// Pause returns when the guest's CPUs have stopped. Pausing again does nothing.
	Pause(ctx context.Context) error
	// Resume returns when they run. Resuming a guest that runs does nothing.
	Resume(ctx context.Context) error
}

// Halt is why a VMM paused its guest by itself: the host could not do what the guest needs.
// It goes on by [Pauser]'s Resume, and tries again what failed.
type Halt struct {
	// Drive is the number of the drive that could not be used; negative: not known.
	Drive int
	// NoSpace reports that the host has no room left for it.
	NoSpace bool
	// Detail is the VMM's reason, in words.
	Detail string
}

const diskFull = "the host's disk is full: "

// Cause puts a halt into words. Path is that of the drive's file; empty: not known.
func (h Halt) Cause(path string) string {
	if path == "" {
		path = "a drive"
	}
	if h.NoSpace {
		return diskFull + path
	}
	return fmt.Sprintf("the host can't use %s: %s", path, h.Detail)
}

// ShortCause puts what [Halt.Cause] has returned into two words.
func ShortCause(cause string) string {
	if strings.HasPrefix(cause, diskFull) {
		return "disk full"
	}
	return "I/O error"
}

// Halter is an Instance whose VMM may pause the guest by itself.
type Halter interface {
	// Halts returns a channel on which each pause is told. One that was not received when
	// the next comes is dropped.
	Halts() <-chan Halt
}
