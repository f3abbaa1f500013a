package smolvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
)

// Signal is the name of a signal as SSH has it: without "SIG".
type Signal string

// The signals that programs use most; a guest knows all others of its kernel too.
const (
	SignalHangup    Signal = "HUP"
	SignalInterrupt Signal = "INT"
	SignalQuit      Signal = "QUIT"
	SignalTerminate Signal = "TERM"
	// SignalKill ends all that a command has started, in whatever process group or session.
	SignalKill Signal = "KILL"
)

// Process is a command that runs in a guest. Its methods may be called by any number of
// goroutines.
type Process interface {
	// PID returns the process's id in the guest; zero if the guest's agent is of a version
	// that does not tell it.
	PID() int
	// Wait returns how the process ended, when it has; again and again if it is called so.
	// When ctx is done it returns ctx's error, and the process goes on.
	Wait(ctx context.Context) (ExitStatus, error)
	// Signal sends a signal to the command's process group; see [SignalKill] for an
	// exception. To a process that has ended nothing is sent, and that is no error.
	Signal(ctx context.Context, signal Signal) error
	// Resize changes the size of the process's terminal; without one it does nothing.
	Resize(ctx context.Context, size WindowSize) error
}

// Result is what came of a command: how it ended, and what it wrote.
type Result struct {
	ExitStatus
	// Stdout and Stderr are what the command wrote, unless it was given writers of its own.
	Stdout, Stderr []byte
}

// MaxOutput is how many bytes of each stream [Run] and [VM.Output] keep. A command that
// writes more is ended, with an error that matches [ErrOutputLimit]: a guest is not to fill
// the memory of the program that uses it.
const MaxOutput = 64 << 20

// ExitError is the error of [VM.Output] for a command that has failed.
type ExitError struct {
	ExitStatus
	// Stderr is what the command wrote to its standard error.
	Stderr []byte
}

func (e *ExitError) Error() string {
	said := strings.TrimSpace(string(e.Stderr))
	if said == "" {
		return e.String()
	}
	const most = 512
	if len(said) > most {
		said = "..." + said[len(said)-most:]
	}
	return fmt.Sprintf("%s: %q", e.String(), said)
}

// limited keeps what is written to it, up to a limit.
type limited struct {
	bytes.Buffer
	most     int
	exceeded context.CancelCauseFunc
}

// Write implements [io.Writer].
func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > l.most {
		err := fmt.Errorf("%w: more than %d bytes", ErrOutputLimit, l.most)
		l.exceeded(err)
		return 0, err
	}
	return l.Buffer.Write(p)
}

// capture runs a command and keeps its output, but for streams that have a writer already.
func capture(ctx context.Context, execs Execs, id string, command Command) (Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stdout, stderr := &limited{most: MaxOutput, exceeded: cancel}, &limited{most: MaxOutput, exceeded: cancel}
	if command.Stdout == nil {
		command.Stdout = stdout
	}
	if command.Stderr == nil {
		command.Stderr = stderr
	}
	status, err := execs.Exec(ctx, id, command)
	if limit := context.Cause(ctx); errors.Is(limit, ErrOutputLimit) && !errors.Is(err, ErrOutputLimit) {
		err = errors.Join(err, limit)
	}
	return Result{ExitStatus: status, Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}, err
}
