// Package errcode carries errors from one process to another: of a shim, of a background
// task, of a server. What arrives prints as it did there, matches the same sentinels of
// package smolvm, and has the same hint.
package errcode

import (
	"errors"

	"github.com/smolvm/smolvm"
)

// Failure is an error as it travels, in JSON.
type Failure struct {
	Message string `json:"message"`
	// Code is the error's kind. Empty, or one that the receiver does not know: the error is
	// nothing but its message there.
	Code smolvm.Code `json:"kind,omitempty"`
	Hint string      `json:"hint,omitempty"`
	// Invalid are the fields of a [smolvm.ValidationError].
	Invalid *smolvm.ValidationError `json:"invalid,omitempty"`
	// Missing is what a host lacks.
	Missing *smolvm.PrerequisiteError `json:"missing,omitempty"`
	// Network names the VM and the operation of a [smolvm.NetworkError].
	Network *Network `json:"network,omitempty"`
}

// Network is what a [smolvm.NetworkError] has beside its cause.
type Network struct {
	ID string `json:"id"`
	Op string `json:"op"`
	// Cause is the message of the cause.
	Cause string `json:"cause"`
}

// Of returns an error in the form in which it travels; nil for nil.
func Of(err error) *Failure {
	if err == nil {
		return nil
	}
	f := &Failure{Message: err.Error(), Code: smolvm.CodeOf(err), Hint: smolvm.HintOf(err)}
	f.Invalid, _ = errors.AsType[*smolvm.ValidationError](err)
	f.Missing, _ = errors.AsType[*smolvm.PrerequisiteError](err)
	if network, ok := errors.AsType[*smolvm.NetworkError](err); ok {
		f.Network = &Network{ID: network.ID, Op: network.Op, Cause: network.Err.Error()}
	}
	return f
}

// Err returns the error that has arrived; nil for nil.
func (f *Failure) Err() error {
	if f == nil {
		return nil
	}
	e := &remote{message: f.Message}
	if sentinel := f.Code.Err(); sentinel != nil {
		e.is = append(e.is, sentinel)
	}
	if f.Invalid != nil {
		e.is = append(e.is, f.Invalid)
	}
	if f.Missing != nil {
		e.is = append(e.is, f.Missing)
	}
	if f.Network != nil {
		e.is = append(e.is, &smolvm.NetworkError{ID: f.Network.ID, Op: f.Network.Op, Err: &remote{f.Network.Cause, e.is}})
	}
	return &smolvm.Error{Code: f.Code, Hint: f.Hint, Err: e}
}

// remote is an error of another process: its words, and what it was.
type remote struct {
	message string
	is      []error
}

func (e *remote) Error() string { return e.message }

func (e *remote) Unwrap() []error { return e.is }
