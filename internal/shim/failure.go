package shim

import (
	"errors"

	"github.com/smolvm/smolvm/internal/errcode"
)

// failure is an error that crosses from one process to another.
type failure struct {
	errcode.Failure
	// Ran reports that the guest ran, if the failure is that of a start.
	Ran bool `json:"ran,omitempty"`
}

func newFailure(err error) *failure { return &failure{Failure: *errcode.Of(err)} }

func (f *failure) error() error { return &crossed{err: f.Err(), ran: f.Ran} }

// GuestRan reports whether a start that failed with err came so far that the guest ran,
// and may have changed its disk.
func GuestRan(err error) bool {
	failed, ok := errors.AsType[*crossed](err)
	return ok && failed.ran
}

// crossed is an error of the other process.
type crossed struct {
	err error
	ran bool // see [failure]
}

func (e *crossed) Error() string { return e.err.Error() }

func (e *crossed) Unwrap() error { return e.err }
