package cli

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

const cpLong = `Copy a file or a directory with all in it into a VM or out of one.

ID:PATH is a path in the VM; without a leading / it starts at root's home directory.
A path of this host that has a colon in it can be written as ./PATH. As with cp(1),
a directory that is there already receives the source under its own name.`

const cpExample = `  smolvm cp main.py web:/srv/
  smolvm cp web:/var/log/messages .`

func (a *app) cpCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "cp SRC ID:DST | cp ID:SRC DST",
		Short:             "Copy files into a VM or out of one",
		Long:              cpLong,
		Example:           cpExample,
		Args:              needs(2, 2, "a source and a destination"),
		ValidArgsFunction: a.copyArgs,
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			fromID, from := parseCopyArg(args[0])
			toID, to := parseCopyArg(args[1])
			switch {
			case fromID == "" && toID == "":
				return usagef("neither %q nor %q is in a VM; write ID:PATH for a path in a VM", args[0], args[1])
			case fromID != "" && toID != "":
				return usagef("%q and %q are both in VMs; copy by way of this host", args[0], args[1])
			}
			return a.withManager(cmd.Context(), func(m *manager.Manager) error {
				if toID != "" {
					return m.CopyTo(cmd.Context(), toID, from, to)
				}
				return m.CopyFrom(cmd.Context(), fromID, from, to)
			})
		}),
	}
}

// copyArgs completes to VMs and, as the shell does by itself, to files of the host.
func (a *app) copyArgs(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ids, _ := a.vmIDs(smolvm.StateRunning)(cmd, nil, prefix)
	for i, described := range ids {
		id, _, _ := strings.Cut(described, "\t")
		ids[i] = id + ":"
	}
	return ids, cobra.ShellCompDirectiveNoSpace
}
