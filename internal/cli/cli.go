// Package cli is the smolvm command: one file per subcommand over a
// [manager.Manager].
//
// The rules of its output:
//   - Standard output carries what was asked for, and nothing else: ids, tables,
//     JSON, or the output of a command in a guest.
//   - Standard error carries the rest: progress, and an error as "smolvm: what
//     failed", with a line "hint: what to do next" where there is something to do.
//   - A table that goes to a terminal fits its width and may be coloured; one that
//     goes elsewhere is whole and plain.
//   - JSON is the types of package smolvm; an empty list is [].
//
// The exit status is 0 for success, 1 for an error and 2 for wrong usage. Commands
// that run something in a guest (run, exec, shell) exit with its status; what is on
// standard error tells the two apart.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/smolvm/smolvm"
	internalshim "github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/manager"
	"github.com/smolvm/smolvm/shim"
)

// Exit statuses of smolvm's own.
const (
	statusError = 1
	statusUsage = 2
	// statusTimeout is what timeout(1) exits with when it has ended a command.
	statusTimeout = 124
	// statusSignal and the number of a signal is how shells report an end by it.
	statusSignal = 128
)

// formerShim is the argument by which programs with package manager of an earlier build start
// this one as the shim of a VM; see COMPATIBILITY.md. It is [internalshim.Argument] now.
const formerShim = "shim"

// Program is the smolvm command with all that it needs of the outside.
type Program struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Version to report. Empty: the version in the build information.
	Version string
}

// Run runs the command line args, which starts after the program's name, and returns
// the exit status. From here on it takes care of signals: they end what it does, or
// are passed on to a command in a guest.
func (p Program) Run(ctx context.Context, args []string) int {
	// A shim lives as long as its VM, so it is spared what only commands need.
	if len(args) > 0 && (args[0] == internalshim.Argument || args[0] == formerShim) {
		return p.runShim(ctx)
	}
	ctx, signals := watchSignals(ctx)
	defer signals.stop()
	a := &app{Program: p, signals: signals, Stdout: newOutput(p.Stdout), Stderr: newOutput(p.Stderr)}
	defer a.Stdout.finish()
	defer a.Stderr.finish()
	root := a.rootCommand()
	root.SetArgs(args)
	executed, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if !a.ran {
		// Cobra refused the command line before a command of ours began.
		err = &usageError{err}
	}
	return a.report(ctx, executed, err)
}

func (p Program) runShim(ctx context.Context) int {
	if err := shim.Run(ctx, p.Stdin); err != nil {
		_, _ = fmt.Fprintln(p.Stderr, "smolvm shim:", err)
		return statusError
	}
	return 0
}

// app is one run of the program.
type app struct {
	Program
	// Stdout and Stderr are what everything is printed to, in the place of the program's
	// streams, which are for commands in guests only.
	Stdout, Stderr *output

	signals *signals
	ran     bool // a command's own code has begun
	makes   bool // the command makes a data directory if there is none

	// Global flags.
	dataDir, socketDir, backend string
	json                        bool

	progress *progress // nil: the building of images is not shown
}

// open opens the data directory that the global flags name.
func (a *app) open(ctx context.Context) (*manager.Manager, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program, which is the VMs' shim too: %w", err)
	}
	config := manager.Config{
		DataDir:     a.dataDir,
		Existing:    !a.makes,
		SocketDir:   a.socketDir,
		Backend:     a.backend,
		ShimCommand: []string{self, internalshim.Argument},
	}
	m, err := manager.Open(ctx, config)
	var noted interface{ Note() string } = m
	if err != nil && !errors.As(err, &noted) {
		return nil, err
	}
	if note := noted.Note(); note != "" {
		a.errorf("smolvm: %s", note)
	}
	return m, err
}

// openNothing opens a data directory with nothing in it, for a command that only looks and
// finds none, and returns what removes it.
func (a *app) openNothing(ctx context.Context) (m *manager.Manager, remove func() error, err error) {
	dir, err := os.MkdirTemp("", "smolvm-none-")
	if err != nil {
		return nil, nil, err
	}
	m, err = manager.Open(ctx, manager.Config{DataDir: dir, SocketDir: a.socketDir, Backend: a.backend})
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	return m, func() error { return os.RemoveAll(dir) }, nil
}

// withManager calls f with a Service, that of a Manager which is closed afterwards.
func (a *app) withManager(ctx context.Context, f func(smolvm.Service) error) error {
	remove := func() error { return nil }
	m, err := a.open(ctx)
	if errors.Is(err, manager.ErrNoDataDir) {
		m, remove, err = a.openNothing(ctx)
	}
	if err != nil {
		return err
	}
	err = f(m)
	a.progress.finish()
	return errors.Join(err, m.Close(), remove())
}
