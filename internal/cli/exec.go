package cli

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const execLong = `Run a command in a running VM, with the standard streams of this program, and exit with
the command's status.

The command is run as it is, without a shell; use sh -c 'LINE' for a shell's syntax.
Signals are passed on to it. A command that has not ended 10 seconds after it was
interrupted, or when it is interrupted again, is killed with all that it has started.

The exit status is 126 if the command can't be run, and 127 if it is not found.`

const execExample = `  smolvm exec web -- ls -l /
  smolvm exec -t web -- top
  tar c src | smolvm exec -w /srv web -- tar x`

// execFlags say how to run a command in a guest.
type execFlags struct {
	tty, noStdin, interactive bool
	dir, user                 string
	timeout                   time.Duration
}

func (f *execFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	// What follows the VM or the image is the command's own.
	flags.SetInterspersed(false)
	flags.BoolVarP(&f.tty, "tty", "t", false, "run the command in a terminal")
	flags.BoolVarP(&f.interactive, "interactive", "i", false, "")
	_ = flags.MarkHidden("interactive") // a habit from docker; input is always passed on here
	flags.BoolVarP(&f.noStdin, "no-stdin", "n", false, "give the command an empty input")
	flags.DurationVar(&f.timeout, "timeout", 0, "end the command after `DURATION`, with exit status 124")
	f.registerPlace(cmd)
}

// registerPlace registers the flags that say where in the guest a command runs.
func (f *execFlags) registerPlace(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.dir, "workdir", "w", "", "run in the directory `DIR` (default: the image's, else the user's home)")
	cmd.Flags().StringVarP(&f.user, "user", "u", "", "run as `USER[:GROUP]`, by names or numbers (default: the image's, else root)")
	complete(cmd, "workdir", words())
	complete(cmd, "user", words())
}

func (a *app) execCommand() *cobra.Command {
	var flags execFlags
	var env []string
	cmd := &cobra.Command{
		Use:               "exec [flags] ID [--] COMMAND...",
		Short:             "Run a command in a VM",
		Long:              execLong,
		Example:           execExample,
		Args:              needs(1, anyNumber, "the id of a VM, and a command"),
		ValidArgsFunction: first(a.vmIDs(smolvm.StateRunning)),
	}
	flags.register(cmd)
	cmd.Flags().FuncP("env", "e", "set a variable: `NAME[=VALUE]` (repeatable)", func(text string) error {
		name, value, err := parseEnv(text)
		env = append(env, name+"="+value)
		return err
	})
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		id, command, err := splitID(args)
		if err != nil {
			return err
		}
		if len(command) == 0 {
			return withHint(usagef("give a command"), "`smolvm shell %s` opens a shell", id)
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			return a.execute(cmd.Context(), m, id, flags, smolvm.Command{Args: command, Env: env})
		})
	})
	return cmd
}

// splitID splits the arguments into the id of a VM and a command.
func splitID(args []string) (id string, command []string, err error) {
	id, command = args[0], args[1:]
	if len(command) == 0 {
		return id, nil, nil
	}
	if command[0] == "--" {
		return id, command[1:], nil
	}
	if strings.HasPrefix(command[0], "-") {
		return "", nil, usagef("%s comes after the VM; flags of smolvm go before it, and a command that begins with - after --", command[0])
	}
	return id, command, nil
}

// execute runs a command in a guest, connected to our streams. A status other than 0
// is returned as an [*exitError].
func (a *app) execute(ctx context.Context, m smolvm.Service, id string, flags execFlags, command smolvm.Command) error {
	ctx, signals, release := a.signals.passOn(ctx)
	defer release()
	if flags.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, flags.timeout, &timeoutError{flags.timeout})
		defer cancel()
	}
	command.Signals = signals
	command.Dir, command.User = flags.dir, flags.user
	command.Stdout, command.Stderr = a.Program.Stdout, a.Program.Stderr
	if fd, ok := terminal(a.Stdin); !flags.noStdin && (!ok || !background(fd)) {
		command.Stdin = a.Stdin
	}
	if flags.tty {
		tty, restore, err := a.attachTTY()
		if err != nil {
			return err
		}
		defer restore()
		command.TTY = tty
	}
	status, err := m.Exec(ctx, id, command)
	var timeout *timeoutError
	switch {
	case errors.As(err, &timeout):
		return &exitError{statusTimeout, err}
	case err != nil:
		return err
	case status.Code != 0:
		return &exitError{status: status.Code}
	}
	return nil
}
