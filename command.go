package smolvm

import (
	"fmt"
	"io"
	"strings"
)

// Command is a program to run in a guest.
type Command struct {
	// Args are the program and its arguments; the program is looked up in the
	// guest's PATH. Use []string{"sh", "-c", line} for a shell's syntax. They are
	// bytes, of any encoding. The guest's kernel takes about 2 MiB of them together
	// with Env, and 128 KiB of each; what is longer ends with exit status 126.
	Args []string
	// Env is added to the guest's environment, as "NAME=value"; a later entry
	// wins over an earlier one.
	Env []string
	// Dir is the working directory. Empty: that of the VM's configuration, else the user's home
	// directory.
	Dir string
	// User to run as, by the guest's /etc/passwd, or a number; with ":" and a group's
	// name or number after it, in that group only. Empty: that of the VM's configuration,
	// else root.
	User string

	// Stdin is copied to the command; nil gives it an empty input. A reader
	// that blocks does not keep Exec from returning when the command ends.
	Stdin io.Reader
	// Stdout and Stderr receive the command's output as it comes; nil throws it
	// away. With a TTY, everything comes by Stdout. When Stdout fails, the command
	// gets SIGPIPE as it goes on writing.
	Stdout, Stderr io.Writer

	// TTY runs the command in a pseudo-terminal; nil gives it pipes.
	TTY *TTY
	// Signals are sent to the command's process group, by the names that SSH
	// uses: "INT", "TERM", "HUP", ... But "KILL" ends all that the command has
	// started, in whatever process group or session.
	Signals <-chan Signal
}

// Validate checks what no guest could run; the error is a [*ValidationError]. Names of
// variables are those that a kernel takes, and that people mean: anything but blanks
// and control characters.
func (c Command) Validate() error {
	v := validator{}
	v.check(len(c.Args) > 0, "args", "is empty; give a command")
	for i, arg := range c.Args {
		v.check(!strings.Contains(arg, "\x00"), fmt.Sprintf("args[%d]", i), "has a NUL in it")
	}
	for i, entry := range c.Env {
		name, _, found := strings.Cut(entry, "=")
		v.check(found && name != "" && !strings.ContainsFunc(name, isBlank), fmt.Sprintf("env[%d]", i), "%q is not NAME=VALUE", entry)
		v.check(!strings.Contains(entry, "\x00"), fmt.Sprintf("env[%d]", i), "has a NUL in it")
	}
	v.check(!strings.Contains(c.Dir, "\x00"), "dir", "has a NUL in it")
	v.check(!strings.Contains(c.User, "\x00"), "user", "has a NUL in it")
	if len(v.fields) > 0 {
		return &ValidationError{Fields: v.fields}
	}
	return nil
}

// isBlank reports whether a character is a blank or a control character of ASCII's.
func isBlank(r rune) bool { return r <= ' ' || r == 0x7f }

// TTY is the terminal a command runs in.
type TTY struct {
	// Term is the value of TERM, as in "xterm-256color". Empty: "xterm".
	Term string
	// Size at the start. Zero: 80 by 24.
	Size WindowSize
	// Resizes carries later sizes; it may be nil.
	Resizes <-chan WindowSize
}

// WindowSize is the size of a terminal in characters.
type WindowSize struct{ Columns, Rows int }

// ExitStatus is how a command ended.
type ExitStatus struct {
	// Code is the exit status; 128 and the signal's number if a signal ended
	// the command, as shells have it.
	Code int `json:"exit_code"`
	// Signal is the name of the signal that ended the command, as in "KILL";
	// empty if it ended by itself.
	Signal string `json:"signal,omitempty"`
	// EgressRevision is that of the VM's egress policy when the command was begun; zero: the
	// VM had none. Of a command that is begun while the policy is being changed it may be
	// the revision before or after.
	EgressRevision int64 `json:"egress_revision,omitempty"`
}

// Success reports whether the command ended by itself with exit status 0.
func (s ExitStatus) Success() bool { return s.Code == 0 && s.Signal == "" }

func (s ExitStatus) String() string {
	if s.Signal != "" {
		return "ended by SIG" + s.Signal
	}
	return fmt.Sprintf("exit status %d", s.Code)
}
