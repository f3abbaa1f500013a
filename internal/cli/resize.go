package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

func (a *app) resizeCommand() *cobra.Command {
	var options smolvm.ResizeOptions
	cmd := a.eachVMCommand(&cobra.Command{
		Use:   "resize --disk-size SIZE ID...",
		Short: "Make the disks of stopped VMs larger",
		Long: `Make the disks of VMs larger that don't run, and print their ids. The root file system of
a VM of an image grows at the VM's next start.`,
	}, func(m smolvm.Service, ctx context.Context, id string) (smolvm.VMInfo, error) {
		return m.Resize(ctx, id, options)
	}, smolvm.StateCreated, smolvm.StateStopped)
	cmd.Flags().Func("disk-size", "new `SIZE` of the disk: MiB, or as in 20G", func(text string) (err error) {
		options.DiskSizeMiB, err = parseMebibytes(text)
		return err
	})
	_ = cmd.MarkFlagRequired("disk-size") // fails only for a flag that is not there
	complete(cmd, "disk-size", words())
	return cmd
}
