package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

func (a *app) pauseCommand() *cobra.Command {
	return a.eachVMCommand(&cobra.Command{
		Use:   "pause ID...",
		Short: "Pause running VMs",
		Long: `Pause running VMs, and print their ids: their CPUs stop, their memory stays, and
connections to them wait until they are resumed.`,
	}, smolvm.Service.Pause, smolvm.StateRunning)
}

func (a *app) resumeCommand() *cobra.Command {
	return a.eachVMCommand(&cobra.Command{
		Use:   "resume ID...",
		Short: "Resume paused VMs",
		Long:  `Resume paused VMs, set their clocks, and print their ids.`,
	}, smolvm.Service.Resume, smolvm.StatePaused)
}

// eachVMCommand makes a command that does one thing to each VM that is named.
func (a *app) eachVMCommand(cmd *cobra.Command, do func(smolvm.Service, context.Context, string) (smolvm.VMInfo, error), states ...smolvm.VMState) *cobra.Command {
	cmd.Args = needs(1, anyNumber, "the ids of VMs")
	cmd.ValidArgsFunction = a.vmIDs(states...)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			return eachOf(args, func(id string) (smolvm.VMInfo, error) { return do(m, cmd.Context(), id) }, a.printVM)
		})
	})
	return cmd
}
