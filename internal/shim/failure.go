package shim

import (
	"errors"

	"github.com/smolvm/smolvm"
)

// failure is an error that crosses from one process to another.
type failure struct {
	Message string `json:"message"`
	// Kind is a key of kinds; empty for an error that is nothing but its message.
	Kind string `json:"kind,omitempty"`
	// Ran reports that the guest ran, if the failure is that of a start.
	Ran bool `json:"ran,omitempty"`
	// Missing is the prerequisite that the error is about.
	Missing *smolvm.PrerequisiteError `json:"missing,omitempty"`
}

// kinds are the errors that keep their identity when they cross.
func kinds() map[string]error {
	return map[string]error{
		"boot-timeout": smolvm.ErrBootTimeout,
		"port-in-use":  smolvm.ErrPortInUse,
		"unsupported":  smolvm.ErrUnsupported,
		"not-found":    smolvm.ErrNotFound,
	}
}

func newFailure(err error) *failure {
	f := &failure{Message: err.Error()}
	for kind, sentinel := range kinds() {
		if errors.Is(err, sentinel) {
			f.Kind = kind
		}
	}
	if missing, ok := errors.AsType[*smolvm.PrerequisiteError](err); ok {
		f.Missing = missing
	}
	return f
}

func (f *failure) error() error {
	is := kinds()[f.Kind]
	if f.Missing != nil {
		is = f.Missing
	}
	return &crossed{message: f.Message, is: is, ran: f.Ran}
}

// GuestRan reports whether a start that failed with err came so far that the guest ran,
// and may have changed its disk.
func GuestRan(err error) bool {
	failed, ok := errors.AsType[*crossed](err)
	return ok && failed.ran
}

// crossed is an error of the other process: its words, and what it was.
type crossed struct {
	message string
	is      error // may be nil
	ran     bool  // see [failure]
}

func (e *crossed) Error() string { return e.message }

func (e *crossed) Unwrap() error { return e.is }
