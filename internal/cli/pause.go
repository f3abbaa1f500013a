package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

func (a *app) pauseCommand() *cobra.Command {
	return a.eachVMCommand(&cobra.Command{
		Use:   "pause ID...",
		Short: "Hold running VMs",
		Long: `Hold running VMs, and print their ids: their CPUs stop, their memory stays, and
connections to them wait until they are resumed.`,
	}, (*manager.Manager).Pause, smolvm.StateRunning)
}

func (a *app) resumeCommand() *cobra.Command {
	return a.eachVMCommand(&cobra.Command{
		Use:   "resume ID...",
		Short: "Let paused VMs go on",
		Long:  `Let paused VMs go on, with their clocks set, and print their ids.`,
	}, (*manager.Manager).Resume, smolvm.StatePaused)
}

// eachVMCommand makes a command that does one thing to each VM that is named.
func (a *app) eachVMCommand(cmd *cobra.Command, do func(*manager.Manager, context.Context, string) (smolvm.VMInfo, error), states ...smolvm.VMState) *cobra.Command {
	cmd.Args = needs(1, anyNumber, "the ids of VMs")
	cmd.ValidArgsFunction = a.vmIDs(states...)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		return a.withManager(cmd.Context(), func(m *manager.Manager) error {
			return eachOf(args, func(id string) (smolvm.VMInfo, error) { return do(m, cmd.Context(), id) }, a.printVM)
		})
	})
	return cmd
}
