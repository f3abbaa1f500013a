package cli

import (
	"errors"
	"net/netip"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

func (a *app) portCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "port",
		Short: "Forward ports of this host to a VM",
		Long: `Forward ports of this host to a VM. A forward is in force at once if the VM runs, and
at each of its starts.`,
		Args: cobra.ArbitraryArgs,
		RunE: a.requireSubcommand,
	}
	cmd.AddCommand(a.portAddCommand(), a.portRmCommand(), a.portLsCommand())
	return cmd
}

func (a *app) portAddCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "add ID [[ADDR:]HOSTPORT:]GUESTPORT[/PROTOCOL]...",
		Short: "Add port forwards, and print the host's address and port of each",
		Long: `Add port forwards, and print the host's address and port of each. The address is
127.0.0.1 unless given; use 0.0.0.0 to let other hosts connect. Without a host port,
a free one is chosen. The protocol is tcp or udp. A range of ports, such as
8000-8010:8000-8010, makes a forward for each port.

Connections go to the guest's own address: they don't reach a server in the guest that
listens on 127.0.0.1 only.`,
		Example:           "  smolvm port add web 8080:80\n  smolvm port add web 0.0.0.0:8443:443\n  smolvm port add dns 5353:53/udp",
		Args:              needs(2, anyNumber, "the id of a VM, and ports"),
		ValidArgsFunction: first(a.vmIDs()),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			var forwards []smolvm.PortForward
			for _, text := range args[1:] {
				parsed, err := parseForwards(text)
				if err != nil {
					return &usageError{err}
				}
				forwards = append(forwards, parsed...)
			}
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				for _, forward := range forwards {
					added, err := m.AddPortForward(cmd.Context(), args[0], forward)
					if err != nil {
						return err
					}
					if err := a.printForward(added); err != nil {
						return err
					}
				}
				return nil
			})
		}),
	}
}

func (a *app) portRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm ID HOSTPORT[/PROTOCOL]...",
		Aliases: []string{"delete"},
		Short:   "Remove port forwards, with their connections",
		Long: `Remove port forwards, with their connections. The protocol is tcp (default) or udp.
HOSTPORT-HOSTPORT removes the forwards of a range of host ports.`,
		Example: "  smolvm port rm web 8080 5353/udp",
		Args:    needs(2, anyNumber, "the id of a VM, and host ports"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return a.vmIDs()(cmd, args, prefix)
			}
			return a.hostPorts(args[0])(cmd, args, prefix)
		},
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			var removed []smolvm.PortForward
			for _, text := range args[1:] {
				rest, protocol, err := cutProtocol(text)
				if err != nil {
					return &usageError{err}
				}
				first, last, err := parsePorts(rest, 1)
				if err != nil {
					return &usageError{err}
				}
				for port := first; port <= last; port++ {
					removed = append(removed, smolvm.PortForward{HostPort: port, Protocol: protocol})
				}
			}
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				var errs []error
				for _, forward := range removed {
					errs = append(errs, m.RemovePortForward(cmd.Context(), args[0], forward))
				}
				return errors.Join(errs...)
			})
		}),
	}
}

func (a *app) portLsCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "ls ID",
		Aliases:           []string{"list"},
		Short:             "List the port forwards of a VM",
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs()),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				forwards, err := m.PortForwards(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if a.json {
					return printList(a, forwards)
				}
				t := &table{titles: []string{"HOST ADDRESS", "HOST PORT", "GUEST PORT", "PROTOCOL"}}
				for _, f := range forwards {
					t.add(f.HostAddr.String(), strconv.Itoa(f.HostPort), strconv.Itoa(f.GuestPort), string(f.Protocol))
				}
				return a.print(t)
			})
		}),
	}
}

func (a *app) printForward(f smolvm.PortForward) error {
	if a.json {
		return a.printJSON(f)
	}
	return a.println(hostAddress(f))
}

func hostAddress(f smolvm.PortForward) string {
	return netip.AddrPortFrom(f.HostAddr, uint16(f.HostPort)).String()
}

// hostPorts completes to the host ports that a VM forwards.
func (a *app) hostPorts(id string) cobra.CompletionFunc {
	return a.completeFrom(func(cmd *cobra.Command, m smolvm.Service, args []string) ([]string, error) {
		forwards, err := m.PortForwards(cmd.Context(), id)
		var found []string
		for _, f := range forwards {
			port := strconv.Itoa(f.HostPort)
			if f.Protocol == smolvm.UDP {
				port += "/udp"
			}
			if !slices.Contains(args, port) {
				found = append(found, cobra.CompletionWithDesc(port, "to "+strconv.Itoa(f.GuestPort)))
			}
		}
		return found, err
	})
}
