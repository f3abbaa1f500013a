package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

// usageError is a command line that makes no sense.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// exitError carries an exit status to the end of the program. With a nil error
// nothing is printed: it is the status of a command in a guest.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// hintError carries what to do next, where the place of the error knows best.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

func withHint(err error, format string, args ...any) error {
	return &hintError{err, fmt.Sprintf(format, args...)}
}

// report prints an error and returns the exit status.
func (a *app) report(ctx context.Context, cmd *cobra.Command, err error) int {
	a.progress.finish()
	var exit *exitError
	if errors.As(err, &exit) && exit.err == nil {
		return exit.status
	}
	var interrupt *interruptError
	if errors.As(err, &interrupt) || errors.As(context.Cause(ctx), &interrupt) {
		// Whoever sent the signal knows; the caller learns it from the status.
		return statusSignal + int(interrupt.signal)
	}
	for line := range strings.Lines(termsafe.Text(err.Error())) {
		a.errorf("smolvm: %s", strings.TrimRight(line, "\n"))
	}
	if hint := a.hint(context.WithoutCancel(ctx), cmd, err); hint != "" {
		a.errorf("hint: %s", hint)
	}
	var usage *usageError
	switch {
	case errors.As(err, &usage):
		return statusUsage
	case exit != nil:
		return exit.status
	}
	return statusError
}

// errorf prints a message on standard error. Most of them quote something that a guest
// may have written; no line of it can be taken for another message.
func (a *app) errorf(format string, args ...any) {
	text := termsafe.Text(fmt.Sprintf(format, args...))
	_, _ = io.WriteString(a.Stderr, strings.ReplaceAll(text, "\n", "\n    ")+"\n")
}

// hint says what to do about an error; empty if there is nothing to say that the
// error does not say itself.
func (a *app) hint(ctx context.Context, cmd *cobra.Command, err error) string {
	var hinted *hintError
	var usage *usageError
	var prerequisite *smolvm.PrerequisiteError
	switch {
	case errors.As(err, &hinted):
		return hinted.hint
	case errors.As(err, &usage):
		return fmt.Sprintf("`%s --help` shows how it is used", cmd.CommandPath())
	case smolvm.HintOf(err) != "":
		return smolvm.HintOf(err)
	case errors.Is(err, smolvm.ErrVMNotFound):
		return a.nearestVM(ctx, cmd.Flags().Args())
	case errors.As(err, &prerequisite):
		return "`smolvm doctor` shows all that this host lacks"
	case errors.Is(err, smolvm.ErrPortInUse):
		return "choose another host port, or leave it out to get a free one"
	case errors.Is(err, smolvm.ErrBootTimeout):
		return "`--boot-timeout` gives the guest longer; `smolvm doctor` shows whether this host is a slow one"
	case errors.Is(err, smolvm.ErrDatabaseTooNew):
		return "use a newer smolvm, or another --data-dir"
	}
	return ""
}

// nearestVM finds the VM that was most likely meant by one of the arguments.
func (a *app) nearestVM(ctx context.Context, args []string) string {
	const list = "`smolvm ls` lists the VMs"
	m, err := a.open(ctx)
	if err != nil {
		return list
	}
	defer func() { _ = m.Close() }()
	vms, err := m.List(ctx, smolvm.ListOptions{})
	if err != nil {
		return list
	}
	ids := make([]string, len(vms))
	for i, vm := range vms {
		ids[i] = vm.ID
	}
	for _, arg := range args {
		id, _, _ := strings.Cut(arg, ":") // as cp has it
		if near := nearest(id, ids); near != "" && near != id {
			return fmt.Sprintf("did you mean %q? %s", near, list)
		}
	}
	return list
}

// nearest finds the word that was most likely meant; empty if none is near.
func nearest(word string, known []string) string {
	// Of more than two differences, or as many as letters, it is another word.
	best, least := "", min(3, len(word))
	for _, candidate := range known {
		if d := editDistance(word, candidate); d < least {
			best, least = candidate, d
		}
	}
	return best
}

// editDistance counts the insertions, deletions and replacements that turn one
// string into the other (Levenshtein).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
