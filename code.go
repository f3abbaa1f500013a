package smolvm

import (
	"context"
	"errors"
	"io/fs"
	"strconv"
)

// Code names a kind of error, for programs that get it from another process. Codes never
// change; new ones may come.
type Code string

// The codes, one for each sentinel error and error type of this package, and for those of
// the standard library that calls end with.
const (
	CodeVMNotFound       Code = "vm-not-found"
	CodeVMExists         Code = "vm-exists"
	CodeImageNotFound    Code = "image-not-found"
	CodeImageInUse       Code = "image-in-use"
	CodeTemplateNotFound Code = "template-not-found"
	CodeSnapshotNotFound Code = "snapshot-not-found"
	CodeSnapshotExists   Code = "snapshot-exists"
	CodePoolNotFound     Code = "pool-not-found"
	CodeUnknownBackend   Code = "unknown-backend"
	CodeNotRestored      Code = "not-restored"
	CodeInvalidState     Code = "invalid-state"
	CodeBootTimeout      Code = "boot-timeout"
	CodeUnhealthy        Code = "unhealthy"
	CodeUnsupported      Code = "unsupported"
	CodePortInUse        Code = "port-in-use"
	CodeNoRoom           Code = "no-room"
	CodeOutputLimit      Code = "output-limit"
	CodeFlowLogChanged   Code = "flow-log-changed"
	CodeCopyIncomplete   Code = "copy-incomplete"
	CodeCopyLimit        Code = "copy-limit"
	CodeDatabaseTooNew   Code = "database-too-new"
	CodeDatabaseCorrupt  Code = "database-corrupt"
	CodeNotFound         Code = "not-found"
	CodeAlreadyExists    Code = "already-exists"
	CodeFileNotFound     Code = "file-not-found" // fs.ErrNotExist
	CodeFileExists       Code = "file-exists"    // fs.ErrExist
	CodePermission       Code = "permission"     // fs.ErrPermission
	CodeCanceled         Code = "canceled"       // context.Canceled
	CodeTimeout          Code = "timeout"        // context.DeadlineExceeded
	CodeInvalid          Code = "invalid"        // *ValidationError
	CodePrerequisite     Code = "prerequisite"   // *PrerequisiteError
	CodeNetwork          Code = "network"        // *NetworkError
	// CodeUnknown is that of all other errors.
	CodeUnknown Code = "unknown"
)

// codeOf is a row of the table of codes.
type codeOf struct {
	code     Code
	sentinel error
}

// codes is the table of codes and sentinels. An error has the code of the first one that it
// matches, so what is special comes before what is general.
func codes() []codeOf {
	return []codeOf{
		{CodeVMNotFound, ErrVMNotFound},
		{CodeVMExists, ErrVMAlreadyExists},
		{CodeImageNotFound, ErrImageNotFound},
		{CodeImageInUse, ErrImageInUse},
		{CodeTemplateNotFound, ErrTemplateNotFound},
		{CodeSnapshotNotFound, ErrSnapshotNotFound},
		{CodeSnapshotExists, ErrSnapshotAlreadyExists},
		{CodePoolNotFound, ErrPoolNotFound},
		{CodeUnknownBackend, ErrUnknownBackend},
		{CodeNotRestored, ErrNotRestored},
		{CodeInvalidState, ErrInvalidState},
		{CodeBootTimeout, ErrBootTimeout},
		{CodeUnhealthy, ErrUnhealthy},
		{CodeUnsupported, ErrUnsupported},
		{CodePortInUse, ErrPortInUse},
		{CodeNoRoom, ErrDiskBudget},
		{CodeOutputLimit, ErrOutputLimit},
		{CodeFlowLogChanged, ErrFlowLogChanged},
		{CodeCopyIncomplete, ErrCopyIncomplete},
		{CodeCopyLimit, ErrCopyLimit},
		{CodeDatabaseTooNew, ErrDatabaseTooNew},
		{CodeDatabaseCorrupt, ErrDatabaseCorrupt},
		{CodeNotFound, ErrNotFound},
		{CodeAlreadyExists, ErrAlreadyExists},
		{CodeFileNotFound, fs.ErrNotExist},
		{CodeFileExists, fs.ErrExist},
		{CodePermission, fs.ErrPermission},
		{CodeCanceled, context.Canceled},
		{CodeTimeout, context.DeadlineExceeded},
	}
}

// Err returns the sentinel error of a code, which errors of that kind match; nil for a code
// that has none or is not known.
func (c Code) Err() error {
	for _, row := range codes() {
		if row.code == c {
			return row.sentinel
		}
	}
	return nil
}

// CodeOf returns the kind of an error, wherever it came from: that of the first [*Error] in
// it that has one, else that of the sentinel or the type that it matches. It is empty for
// nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	if code := firstOf(err, func(e *Error) string { return string(e.Code) }); code != "" {
		return Code(code)
	}
	for _, row := range codes() {
		if errors.Is(err, row.sentinel) {
			return row.code
		}
	}
	if _, ok := errors.AsType[*ValidationError](err); ok {
		return CodeInvalid
	}
	if _, ok := errors.AsType[*PrerequisiteError](err); ok {
		return CodePrerequisite
	}
	if _, ok := errors.AsType[*NetworkError](err); ok {
		return CodeNetwork
	}
	return CodeUnknown
}

// HintOf returns what to do about an error, as a sentence for a person; empty if there is
// nothing to say that the error does not say itself.
func HintOf(err error) string { return firstOf(err, func(e *Error) string { return e.Hint }) }

// firstOf returns the first text, not empty, that is found in an [*Error] of err's tree.
func firstOf(err error, text func(*Error) string) string {
	//nolint:errorlint // this walks the whole tree itself: the first *Error may lack what the next one has
	switch e := err.(type) {
	case *Error:
		if found := text(e); found != "" {
			return found
		}
		return firstOf(e.Err, text)
	case interface{ Unwrap() error }:
		return firstOf(e.Unwrap(), text)
	case interface{ Unwrap() []error }:
		for _, inner := range e.Unwrap() {
			if found := firstOf(inner, text); found != "" {
				return found
			}
		}
	}
	return ""
}

// Error is an error with what a program or a person needs to act on it. Any field may be
// empty. Use [CodeOf] and [HintOf], and errors.Is with the sentinels, rather than the type:
// not every error has one.
type Error struct {
	// Code is the kind of error. Empty: that of Err.
	Code Code
	// Op is what was being done, as in "start"; Kind and ID name what it was done to, as in
	// "VM" and "web".
	Op, Kind, ID string
	// Hint is what to do next, as a sentence for a person. It may name a command of the
	// smolvm program, in backticks.
	Hint string
	// Err is what went wrong.
	Err error
}

func (e *Error) Error() string {
	problem := e.cause()
	if e.Op == "" {
		return problem
	}
	prefix := e.Op
	if e.Kind != "" {
		prefix += " " + e.Kind
	}
	if e.ID != "" {
		prefix += " " + strconv.Quote(e.ID)
	}
	return prefix + ": " + problem
}

func (e *Error) cause() string {
	if e.Err != nil {
		return e.Err.Error()
	}
	if sentinel := e.Code.Err(); sentinel != nil {
		return sentinel.Error()
	}
	return string(e.Code)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is the sentinel of the error's code, or one above it.
func (e *Error) Is(target error) bool {
	sentinel := e.Code.Err()
	return sentinel != nil && errors.Is(sentinel, target)
}
