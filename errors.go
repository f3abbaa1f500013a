package smolvm

import (
	"errors"
	"fmt"
	"strings"
)

// Sentinel errors. Every error of this module that belongs to one of these
// kinds matches it with [errors.Is], however deeply it is wrapped.
var (
	// ErrNotFound is the root of all the "no such thing" errors.
	ErrNotFound = errors.New("not found")
	// ErrAlreadyExists is the root of all the "name is taken" errors.
	ErrAlreadyExists = errors.New("already exists")

	// ErrVMNotFound reports that no VM has the given id, which may be one that no VM
	// can have: the error is a [*ValidationError] as well then.
	ErrVMNotFound = fmt.Errorf("VM %w", ErrNotFound)
	// ErrVMAlreadyExists reports that the id of a new VM is taken.
	ErrVMAlreadyExists = fmt.Errorf("VM %w", ErrAlreadyExists)
	// ErrImageNotFound reports that no image has the given name or digest.
	ErrImageNotFound = fmt.Errorf("image %w", ErrNotFound)
	// ErrImageInUse reports that an image can't be removed while VMs use it.
	ErrImageInUse = errors.New("image is in use")
	// ErrTemplateNotFound reports that no template has the given id.
	ErrTemplateNotFound = fmt.Errorf("template %w", ErrNotFound)
	// ErrSnapshotNotFound reports that no snapshot has the given name.
	ErrSnapshotNotFound = fmt.Errorf("snapshot %w", ErrNotFound)
	// ErrSnapshotAlreadyExists reports that the name of a new snapshot is taken.
	ErrSnapshotAlreadyExists = fmt.Errorf("snapshot %w", ErrAlreadyExists)
	// ErrPoolNotFound reports that there is no such pool.
	ErrPoolNotFound = fmt.Errorf("pool %w", ErrNotFound)
	// ErrUnknownBackend reports that this program has no backend of that name. Its hint
	// lists those that it has.
	ErrUnknownBackend = errors.New("unknown backend")
	// ErrNotRestored reports that a VM can't go on from the memory of a snapshot or of
	// another VM.
	ErrNotRestored = errors.New("the saved memory can't be used")
	// ErrInvalidState reports that the VM's state does not allow the operation.
	ErrInvalidState = errors.New("invalid VM state")
	// ErrBootTimeout reports that the guest was not ready in the time given.
	ErrBootTimeout = errors.New("boot timed out")
	// ErrUnhealthy reports that what runs in the VM does not work, by the checks of its health.
	ErrUnhealthy = errors.New("it is unhealthy")
	// ErrUnsupported reports that this VM or backend can't do what was asked:
	// for example Exec in a guest that runs no agent.
	ErrUnsupported = errors.New("not supported")
	// ErrPortInUse reports that another program or VM holds a host port.
	ErrPortInUse = errors.New("host port is in use")
	// ErrOutputLimit reports that a command wrote more than is kept of its output.
	ErrOutputLimit = errors.New("too much output")
	// ErrFlowLogChanged reports that a VM's flow log is not as it was written.
	ErrFlowLogChanged = errors.New("flow log was changed")
	// ErrDiskBudget reports that what VMs keep takes as much of the disk as it may, or
	// that too little of the disk is free.
	ErrDiskBudget = errors.New("no room on the disk")
	// ErrDatabaseTooNew reports that the state database was written by a newer
	// release than this program.
	ErrDatabaseTooNew = errors.New("database is newer than this program")
	// ErrDatabaseCorrupt reports that the state database can't be read.
	ErrDatabaseCorrupt = errors.New("database is corrupt")
)

// FieldError is one field of a configuration that can't be accepted.
type FieldError struct {
	// Field is the field's JSON name, as in "memory_mib" or "drives[1].path".
	Field string `json:"field"`
	// Problem says what is wrong and what would be right.
	Problem string `json:"problem"`
}

func (e FieldError) String() string { return e.Field + ": " + e.Problem }

// ValidationError reports every bad field of a configuration at once.
type ValidationError struct {
	// ID is the id of the VM the configuration was for; it may be empty.
	ID string
	// Fields holds at least one entry.
	Fields []FieldError
}

func (e *ValidationError) Error() string {
	fields := make([]string, len(e.Fields))
	for i, f := range e.Fields {
		fields[i] = f.String()
	}
	problems := strings.Join(fields, "; ")
	if e.ID == "" {
		return "invalid " + problems
	}
	return fmt.Sprintf("invalid configuration of VM %q: %s", e.ID, problems)
}

// NetworkError reports that a VM's network could not be set up or changed.
type NetworkError struct {
	ID  string // the VM
	Op  string // what was being done, as in "reserve SSH port"
	Err error  // why it failed
}

func (e *NetworkError) Error() string {
	return fmt.Sprintf("VM %q: network: %s: %v", e.ID, e.Op, e.Err)
}

// Unwrap returns the cause.
func (e *NetworkError) Unwrap() error { return e.Err }

// PrerequisiteError reports what the host lacks.
type PrerequisiteError struct {
	// Backend is the backend that was checked.
	Backend string
	// Findings holds at least one finding that keeps the backend from working.
	Findings []Finding
}

func (e *PrerequisiteError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "backend %s can't run on this host", e.Backend)
	for i, f := range e.Findings {
		sep := "; "
		if i == 0 {
			sep = ": "
		}
		b.WriteString(sep + f.String())
	}
	return b.String()
}
