package shim

import (
	"errors"

	"github.com/smolvm/smolvm/internal/errcode"
)

// Failure is an error that crosses from one process to another.
type Failure struct {
	errcode.Failure
	// Ran reports that the guest ran, if the failure is that of a start.
	Ran bool `json:"ran,omitempty"`
}

// NewFailure makes a [Failure] of an error.
func NewFailure(err error) *Failure { return &Failure{Failure: *errcode.Of(err)} }

// Err makes an error of a failure. It matches what the error of the other process did, as
// far as that is in the failure.
func (f *Failure) Err() error { return &remoteError{err: f.Failure.Err(), ran: f.Ran} }

// GuestRan reports whether a start that failed with err came so far that the guest ran,
// and may have changed its disk.
func GuestRan(err error) bool {
	failed, ok := errors.AsType[*remoteError](err)
	return ok && failed.ran
}

// remoteError is an error of the other process.
type remoteError struct {
	err error
	ran bool // see [Failure]
}

func (e *remoteError) Error() string { return e.err.Error() }

func (e *remoteError) Unwrap() error { return e.err }
