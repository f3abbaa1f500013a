package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

const sshLong = `Log in to a VM with the ssh client of this host, or run a command with it. The VM's host
key is known, so ssh asks nothing and nobody can pose as the VM; the key of a VM with a
kernel of its own is learned at the first login.

The VM is reached by the guest channel, so this needs neither a network nor a port of the host;
only a VM with a kernel of its own is reached by its port. Everything that ssh can do works; ` + "`smolvm shell`" + ` and ` + "`smolvm exec`" + ` need no ssh client.
With --print the command line is only printed, to be used elsewhere: by the port of the host, if
there is one.`

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
		vm, err := m.Get(cmd.Context(), id)
		if err != nil {
			return err
		}
		if !vm.Network.Mode.Forwards() {
			if options.ProxyCommand, err = a.proxyFor(vm); err != nil {
				return err
			}
		}
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
		var proxy string
		if vm.Config.UsesImage() || !vm.Network.Mode.Forwards() {
			if proxy, err = a.proxyFor(vm); err != nil {
				return err
			}
		}
		access, err := m.SSH(cmd.Context(), id, smolvm.SSHOptions{User: user, ProxyCommand: proxy})
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

// proxyCommand is the name of the command that connects its standard streams to a guest.
const proxyCommand = "ssh-proxy"

// proxyFor returns the command by which ssh reaches a VM without a port of the host.
func (a *app) proxyFor(vm smolvm.VMInfo) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program, by which ssh is to reach the VM: %w", err)
	}
	words := []string{self}
	for _, flag := range [][2]string{{"--data-dir", a.dataDir}, {"--socket-dir", a.socketDir}} {
		if flag[1] == "" {
			continue
		}
		path, err := filepath.Abs(flag[1])
		if err != nil {
			return "", err
		}
		words = append(words, flag[0], path)
	}
	words = append(words, proxyCommand, vm.ID)
	for i, word := range words { // for the shell that ssh starts, and before that, for ssh
		words[i] = "'" + strings.ReplaceAll(strings.ReplaceAll(word, "'", `'\''`), "%", "%%") + "'"
	}
	return strings.Join(words, " "), nil
}

// sshProxyCommand is what ssh runs; see [app.proxyFor].
func (a *app) sshProxyCommand() *cobra.Command {
	return &cobra.Command{
		Use:    proxyCommand + " ID",
		Short:  "Connect the standard streams to a VM's SSH",
		Hidden: true,
		Args:   withID,
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				address := net.JoinHostPort("127.0.0.1", strconv.Itoa(sshPort))
				conn, err := m.Dial(cmd.Context(), args[0], "tcp", address)
				if err != nil {
					return err
				}
				defer func() { _ = conn.Close() }()
				stop := context.AfterFunc(cmd.Context(), func() { _ = conn.Close() })
				defer stop()
				go func() {
					_, _ = io.Copy(conn, a.Stdin)
					if half, ok := conn.(interface{ CloseWrite() error }); ok {
						_ = half.CloseWrite()
					}
				}()
				if _, err := io.Copy(a.Stdout, conn); err != nil && cmd.Context().Err() == nil {
					return fmt.Errorf("connection to VM %q: %w", args[0], err)
				}
				return nil
			})
		}),
	}
}

// sshPort is where a guest's SSH server listens.
const sshPort = 22
