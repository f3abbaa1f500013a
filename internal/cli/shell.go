package cli

import (
	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const shellLong = `Open a login shell in a running VM. Without a terminal the shell reads its commands
from standard input.`

func (a *app) shellCommand() *cobra.Command {
	var flags execFlags
	cmd := &cobra.Command{
		Use:               "shell [flags] ID",
		Short:             "Open a shell in a VM",
		Long:              shellLong,
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs(smolvm.StateRunning)),
	}
	flags.registerPlace(cmd)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		flags.tty = a.interactive()
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			return a.execute(cmd.Context(), m, args[0], flags, smolvm.Command{Args: loginShell()})
		})
	})
	return cmd
}

// loginShell returns the command line of a login shell that every image has.
func loginShell() []string { return []string{"sh", "-l"} }
