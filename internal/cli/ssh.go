package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

const sshLong = `Log in to a VM with the ssh client of this host, or run a command with it. The VM's host
key is known, so ssh asks nothing and nobody can pose as the VM; the key of a VM with a
kernel of its own is learned at the first login.

Everything that ssh can do works; ` + "`smolvm shell`" + ` and ` + "`smolvm exec`" + ` need no ssh client.
With --print the command line is only printed, to be used elsewhere.`

func (a *app) sshCommand() *cobra.Command {
	var options smolvm.SSHOptions
	var show bool
	cmd := &cobra.Command{
		Use:               "ssh [flags] ID [--] [COMMAND...]",
		Short:             "Log in to a VM by ssh",
		Long:              sshLong,
		Example:           "  smolvm ssh web\n  smolvm ssh --print --public-host vm.example.org web",
		Args:              needs(1, anyNumber, "the id of a VM"),
		ValidArgsFunction: first(a.vmIDs(smolvm.StateRunning)),
	}
	flags := cmd.Flags()
	flags.SetInterspersed(false)
	flags.StringVarP(&options.User, "user", "u", "", "log in as `USER` (default root)")
	flags.BoolVar(&show, "print", false, "print the command instead of running it")
	flags.StringVarP(&options.KeyPath, "key", "i", "", "with --print: use the private key in `FILE`")
	flags.StringVar(&options.PublicHost, "public-host", "", "with --print: a command for other hosts, which know this one as `HOST`")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		id, command, err := splitID(args)
		if err != nil {
			return err
		}
		if show || a.json {
			return a.printSSH(cmd, id, options)
		}
		if options.KeyPath != "" || options.PublicHost != "" {
			return usagef("--key and --public-host go with --print")
		}
		return a.execSSH(cmd, id, options.User, command)
	})
	return cmd
}

func (a *app) printSSH(cmd *cobra.Command, id string, options smolvm.SSHOptions) error {
	return a.withManager(cmd.Context(), func(m smolvm.Service) error {
		access, err := m.SSH(cmd.Context(), id, options)
		switch {
		case err != nil:
			return err
		case a.json:
			return a.printJSON(access)
		case options.PublicHost != "":
			return a.println(access.Public())
		}
		return a.println(access.String())
	})
}

// execSSH replaces this process by ssh.
func (a *app) execSSH(cmd *cobra.Command, id, user string, command []string) error {
	var argv []string
	err := a.withManager(cmd.Context(), func(m smolvm.Service) (err error) {
		vm, err := m.Get(cmd.Context(), id)
		if err != nil {
			return err
		}
		if !vm.State.Alive() {
			return &smolvm.Error{Op: "log in to", Kind: "VM", ID: id,
				Err: fmt.Errorf("%w: it is %s; start it first", smolvm.ErrInvalidState, vm.State)}
		}
		access, err := m.SSH(cmd.Context(), id, smolvm.SSHOptions{User: user})
		argv = access.Args
		return err
	})
	if err != nil {
		return err
	}
	path, err := exec.LookPath(argv[0])
	if errors.Is(err, exec.ErrNotFound) {
		return withHint(fmt.Errorf("there is no ssh client in PATH"), "`smolvm shell %s` needs none", id)
	} else if err != nil {
		return fmt.Errorf("find ssh client: %w", err)
	}
	if err := unix.Exec(path, append(argv, command...), os.Environ()); err != nil {
		return fmt.Errorf("run %s: %w", path, err)
	}
	return nil
}
