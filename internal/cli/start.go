package cli

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const startLong = `Start VMs, wait until they are ready, and print their ids. A VM of an image is ready when
commands can be run in it.`

func (a *app) startCommand() *cobra.Command {
	var options smolvm.StartOptions
	var timings *bool
	var wait waitFor
	cmd := &cobra.Command{
		Use:               "start [flags] ID...",
		Short:             "Start VMs",
		Long:              startLong,
		Args:              needs(1, anyNumber, "the ids of VMs"),
		ValidArgsFunction: a.vmIDs(smolvm.StateCreated, smolvm.StateStopped),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				return eachOf(args, func(id string) (smolvm.VMInfo, error) {
					return startVM(cmd.Context(), m, id, options, wait)
				}, func(vm smolvm.VMInfo) error { return a.printStarted(vm, *timings) })
			})
		}),
	}
	startFlags(cmd, &options)
	wait.register(cmd)
	timings = timingsFlag(cmd)
	return cmd
}

// startFlags adds the flags that say how to start a VM.
func startFlags(cmd *cobra.Command, options *smolvm.StartOptions) {
	bootTimeoutFlag(cmd, &options.Timeout)
	cmd.Flags().BoolVar(&options.Cold, "cold", false, "boot instead of cloning, and make no template")
}

func bootTimeoutFlag(cmd *cobra.Command, timeout *time.Duration) {
	cmd.Flags().DurationVar(timeout, "boot-timeout", 0,
		"wait at most `DURATION` for the guest to be ready (default 30s; 2m without hardware virtualization, more where that is slow)")
}
