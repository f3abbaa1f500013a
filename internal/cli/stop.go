package cli

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const stopLong = `Shut VMs down and print their ids. A guest that has not shut down in the time given
is ended. If no time is given, a guest that has no agent and does not react to its power
button is ended after about a second. Stopping a VM that does not run does nothing.`

func (a *app) stopCommand() *cobra.Command {
	var timeout time.Duration
	var all bool
	cmd := &cobra.Command{
		Use:               "stop [flags] ID...",
		Short:             "Stop VMs",
		Long:              stopLong,
		ValidArgsFunction: a.vmIDs(smolvm.StateRunning, smolvm.StatePaused),
	}
	cmd.Flags().DurationVarP(&timeout, "timeout", "t", smolvm.DefaultStopTimeout, "wait at most `DURATION` for the guest; 0 ends it at once")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "stop all VMs that run")
	cmd.Args = idsOrAll(&all)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		var options smolvm.StopOptions
		switch {
		case timeout <= 0:
			options.Kill = true
		case cmd.Flags().Changed("timeout"):
			options.Timeout = timeout
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			ids, err := selectVMs(cmd, m, args, all, smolvm.VMState.Alive)
			if err != nil {
				return err
			}
			return eachOf(ids, func(id string) (smolvm.VMInfo, error) {
				return m.Stop(cmd.Context(), id, options)
			}, a.printVM)
		})
	})
	return cmd
}

// idsOrAll returns the check of arguments that are either ids of VMs or --all.
func idsOrAll(all *bool) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if *all {
			return needs(0, 0, "either ids of VMs or --all")(cmd, args)
		}
		return needs(1, anyNumber, "the ids of VMs, or --all")(cmd, args)
	}
}

// selectVMs returns the ids given, or those of all VMs whose state fits.
func selectVMs(cmd *cobra.Command, m smolvm.Service, ids []string, all bool, fits func(smolvm.VMState) bool) ([]string, error) {
	if !all {
		return ids, nil
	}
	vms, err := m.List(cmd.Context(), smolvm.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, vm := range vms {
		if fits(vm.State) {
			ids = append(ids, vm.ID)
		}
	}
	return ids, nil
}
