package smolvm

import "time"

// CreateOptions are the options of [VMs.Create].
type CreateOptions struct {
	// Reuse returns the VM that has the id already, if its configuration is the one asked
	// for; a difference is an error that matches [ErrVMAlreadyExists] and names the
	// fields. By default an id that is taken is an error in any case, as two callers who
	// have chosen it by chance must not share a VM.
	Reuse bool
	// Pull says when the VM's image is pulled, if it is an OCI image. Empty: [PullMissing].
	// Names of images that were built here mean those, and are not pulled.
	Pull PullPolicy
	// Progress is told how the pulling or building of a missing image goes on; it may be
	// nil.
	Progress func(Progress)
}

// StartOptions are the options of [VMs.Start].
type StartOptions struct {
	// Timeout for the guest to become ready. Zero: 30 s with hardware
	// virtualization, four times as long without.
	Timeout time.Duration
	// Cold boots the guest from the beginning, and has no template made.
	Cold bool
}

// DefaultBootTimeout is how long a guest may take to become ready under hardware
// virtualization, as in Python's SmolVM.
const DefaultBootTimeout = 30 * time.Second

// StopOptions are the options of [VMs.Stop].
type StopOptions struct {
	// Timeout for an orderly shutdown; after that the VM is ended the hard way.
	// Zero: 10 s, but no more than about a second for a guest that does not listen:
	// one without an agent that shows no sign of having noticed its power button.
	Timeout time.Duration
	// Kill ends the VM at once.
	Kill bool
}

// DeleteOptions are the options of [VMs.Delete].
type DeleteOptions struct {
	// Timeout for an orderly shutdown of a VM that runs. Zero: it is ended at once,
	// unless its disk is to be retained.
	Timeout time.Duration
}

// DefaultStopTimeout is how long a guest may take to shut down, as in Python's
// SmolVM.
const DefaultStopTimeout = 10 * time.Second

// ResizeOptions are the options of [VMs.Resize].
type ResizeOptions struct {
	// DiskSizeMiB is the new size of the VM's own disk, which can't be smaller than it is.
	DiskSizeMiB int64
}

// ListOptions are the options of [VMs.List]. A VM is listed if it meets all of
// them; the zero value lists all VMs.
type ListOptions struct {
	// IDs are ids of VMs, or patterns of them as in [path.Match]: "web-*". A VM meets
	// one of them. Ids of no VM are no error.
	IDs []string
	// State is the VM's state. Empty: any.
	State VMState
	// Image is the name under which the VM was created, the digest of its image, or
	// the beginning of that. Empty: any image or none.
	Image string
	// Labels are labels that the VM has, with these values.
	Labels map[string]string
}

// LogOptions are the options of [VMs.Logs].
type LogOptions struct {
	// Tail starts so many lines before the end. Zero: at the beginning.
	Tail int
	// Follow goes on as the guest writes, until the VM ends.
	Follow bool
}
