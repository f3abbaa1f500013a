package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

const runLong = `Run a command in a new VM, with the standard streams of this program, and exit with the
command's status. The VM is removed at the end, also if this program is interrupted or
killed. With --keep the VM goes on running instead.

IMAGE is by default ` + "`base`" + `, which is built when it is first needed. An image of a
registry, such as python:3.12-slim, is pulled if it is missing: its entrypoint, command,
environment, working directory and user are obeyed, and flags override them. Write --
between the flags and the command if no image is named.

Without a command, the image's own is run, or a shell if the image has no configuration.
Unless it is on a terminal, a shell reads its commands from standard input.

The command is run as it is, without a shell; use sh -c 'LINE' for a shell's syntax.
Signals are passed on to it. A command that has not ended 10 seconds after it was
interrupted, or when it is interrupted again, is killed.

With --kernel the VM boots files of your own, which have no agent to run a command: the
VM's console is printed until it powers off.`

const runExample = `  smolvm run -- uname -a
  echo hi | smolvm run -- cat
  smolvm run python:3.12-slim -- python3 -c 'print(6 * 7)'
  smolvm run -e TOKEN --memory 1G --timeout 60s base -- sh -c 'wget -qO- http://example.org'
  smolvm run --keep --name web -p 8080:80 -- httpd -p 80`

// runFlags are the flags of run.
type runFlags struct {
	vm       vmFlags
	exec     execFlags
	start    smolvm.StartOptions
	keep, rm bool
	timings  bool
	wait     waitFor
}

func (a *app) runCommand() *cobra.Command {
	var flags runFlags
	cmd := &cobra.Command{
		Use:               "run [flags] [IMAGE] [--] [COMMAND...]",
		Short:             "Run a command in a new VM",
		Long:              runLong,
		Example:           runExample,
		ValidArgsFunction: first(a.imageNames()),
	}
	flags.vm.register(cmd)
	flags.exec.register(cmd)
	startFlags(cmd, &flags.start)
	flags.wait.register(cmd)
	cmd.Flags().BoolVar(&flags.keep, "keep", false, "keep the VM running, and print its id on standard error")
	cmd.Flags().BoolVar(&flags.rm, "rm", false, "remove the VM at the end (the default)")
	cmd.Flags().BoolVar(&flags.timings, "timings", false, "print on standard error how the VM was started and how long each phase took")
	cmd.MarkFlagsMutuallyExclusive("keep", "rm")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		image, command, err := splitImage(args, cmd.ArgsLenAtDash())
		if err != nil {
			return err
		}
		config, err := flags.vm.resolve(a, image)
		if err != nil {
			return err
		}
		config.Ephemeral = !flags.keep
		if config.UsesImage() { // for later commands too, as docker has it
			config.User = flags.exec.user
			if strings.HasPrefix(flags.exec.dir, "/") {
				config.WorkingDir = flags.exec.dir
			}
		}
		if len(command) > 0 && !config.UsesImage() {
			return usagef("a VM with a kernel of its own has no agent to run %q; give an image instead of --kernel, or no command", command[0])
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			if image != "" {
				a.tellHidden(cmd.Context(), m, image)
			}
			err := a.run(cmd.Context(), m, config, &flags, command)
			if errors.Is(err, smolvm.ErrImageNotFound) && image != "" {
				err = withHint(err, "to run %q in the default image, write `smolvm run -- %s`",
					image, strings.Join(append([]string{image}, command...), " "))
			}
			return err
		})
	})
	return cmd
}

// splitImage splits the arguments of run into an image and a command. dash is the
// number of arguments before a "--" that comes first; negative: there is none.
func splitImage(args []string, dash int) (image string, command []string, err error) {
	if dash == 0 || len(args) == 0 {
		return "", args, nil
	}
	image, command, err = splitID(args)
	if err != nil {
		err = withHint(usagef("%s comes after the image %q; flags of smolvm go before it, and a command after --", args[1], args[0]),
			"to run %q in the default image, write `smolvm run -- %s`", args[0], strings.Join(args, " "))
	}
	return image, command, err
}

// run makes a VM, runs a command in it, and removes it.
func (a *app) run(ctx context.Context, m smolvm.Service, config smolvm.VMConfig, flags *runFlags, command []string) (err error) {
	times := startStopwatch()
	if flags.timings {
		defer times.print(a.Stderr)
	}
	vm, err := m.Create(ctx, config, flags.vm.creation(a))
	a.progress.finish()
	times.lap("create", vm.Timeline...)
	if err != nil {
		return err
	}
	keep := false
	defer func() {
		if !keep {
			err = errors.Join(err, remove(ctx, m, vm.ID))
			times.lap("remove")
			if err != nil && config.TTL > 0 {
				a.tellTTL(ctx, m, vm.ID, config.TTL)
			}
		}
	}()
	if err := errors.Join(checkCommand(ctx, m, vm, command), flags.wait.check(vm)); err != nil {
		return err
	}
	started, err := m.Start(ctx, vm.ID, flags.start)
	times.lap("start", startTimeline(started)...)
	if err != nil {
		return err
	}
	a.tellStart(started, flags.timings || a.showsMethod())
	keep = flags.keep
	if keep {
		a.errorf("smolvm: VM %s is kept running; `smolvm rm %s` removes it", vm.ID, vm.ID)
	}
	switch {
	case !config.UsesImage() && keep:
		return nil
	case !config.UsesImage():
		err = a.console(ctx, m, vm.ID)
		times.lap("console")
		return err
	case len(command) == 0:
		flags.exec.tty = flags.exec.tty || a.interactive()
	}
	if command = vm.Config.CommandLine(command...); len(command) == 0 {
		command = loginShell()
	}
	execute := func(ctx context.Context) error {
		return a.execute(ctx, m, vm.ID, flags.exec, smolvm.Command{Args: command})
	}
	switch {
	case flags.wait == "":
		err = execute(ctx)
	case vm.Config.Init != "":
		if err = flags.wait.await(ctx, m, vm.ID); err == nil {
			err = execute(ctx)
		}
	default:
		err = a.executeHealthy(ctx, m, vm.ID, execute)
	}
	times.lap("first exec") // with the login
	return err
}

// checkCommand checks that there is something to run in a VM: an OCI image may have no command of
// its own, and need not have a shell either.
func checkCommand(ctx context.Context, m smolvm.Service, vm smolvm.VMInfo, command []string) error {
	if !vm.Config.UsesImage() || vm.Config.Init != "" || len(vm.Config.CommandLine(command...)) > 0 {
		return nil
	}
	image, err := m.Image(ctx, vm.Image)
	if err != nil || image.Config == nil {
		return err
	}
	return usagef("image %s has no command of its own; give one", vm.Config.Image)
}

// console prints a VM's console until the VM ends.
func (a *app) console(ctx context.Context, m smolvm.Service, id string) error {
	log, err := m.Logs(ctx, id, smolvm.LogOptions{Follow: true})
	if err != nil {
		return err
	}
	_, err = io.Copy(a.Stdout, log)
	return errors.Join(err, log.Close())
}

// remove removes the VM at the end of a run, interrupted or not. If its guest has
// powered off it is gone already.
func remove(ctx context.Context, m smolvm.Service, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	err := m.Delete(ctx, id, smolvm.DeleteOptions{})
	if errors.Is(err, smolvm.ErrVMNotFound) {
		return nil
	}
	return err
}

// ttlOver is how a shim notes that it stops a VM at the end of its time.
const ttlOver = "its time to live is over"

// tellTTL tells why a command did not end by itself, if that was the end of the VM's
// time. The events of a VM are there when it is not.
func (a *app) tellTTL(ctx context.Context, m smolvm.Service, id string, ttl time.Duration) {
	events, err := m.Events(context.WithoutCancel(ctx), smolvm.EventOptions{VM: id})
	if err != nil {
		return
	}
	for _, event := range events {
		if strings.Contains(event.Detail, ttlOver) {
			a.errorf("smolvm: the VM's time to live of %s is over, and it was stopped", ttl)
			return
		}
	}
}

// removeTimeout bounds the removal of a VM, for which a tenth of a second is normal.
const removeTimeout = 30 * time.Second

// stopwatch measures phases that follow each other.
type stopwatch struct {
	began, last time.Time
	phases      []smolvm.Phase
}

func startStopwatch() *stopwatch {
	now := time.Now()
	return &stopwatch{began: now, last: now}
}

// lap ends a phase, which may be known in parts.
func (s *stopwatch) lap(phase string, parts ...smolvm.Phase) {
	now := time.Now()
	took := now.Sub(s.last)
	s.last = now
	for _, part := range parts {
		s.phases = append(s.phases, smolvm.Phase{Name: phase + ": " + part.Name, Duration: part.Duration})
		took -= part.Duration
	}
	if len(parts) > 0 {
		phase += ": rest"
	}
	s.phases = append(s.phases, smolvm.Phase{Name: phase, Duration: took})
}

func (s *stopwatch) print(w io.Writer) {
	printPhases(w, append(s.phases, smolvm.Phase{Name: "total", Duration: s.last.Sub(s.began)}))
}

func printPhases(w io.Writer, phases []smolvm.Phase) {
	for _, phase := range phases {
		_, _ = fmt.Fprintf(w, "smolvm: %-20s %10s\n", termsafe.Line(phase.Name), took(phase.Duration))
	}
}

// showsMethod reports whether somebody is there to be told how a VM was started, unasked.
func (a *app) showsMethod() bool {
	_, ok := terminal(a.Stderr)
	return ok
}
