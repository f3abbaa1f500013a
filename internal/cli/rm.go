package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const rmLong = `Remove VMs with all that belongs to them, and print their ids. A VM that runs is ended
at once; with --timeout its guest is shut down first, as by stop.`

func (a *app) rmCommand() *cobra.Command {
	var force, all bool
	var options smolvm.DeleteOptions
	cmd := &cobra.Command{
		Use:               "rm [flags] ID...",
		Aliases:           []string{"delete"},
		Short:             "Remove VMs",
		Long:              rmLong,
		ValidArgsFunction: a.vmIDs(),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "no error if a VM is not there")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "remove all VMs")
	cmd.Flags().DurationVarP(&options.Timeout, "timeout", "t", 0, "wait at most `DURATION` for a guest that runs to shut down")
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if force && len(args) == 0 {
			return nil // as with rm: so that `rm -f $ids` works
		}
		return idsOrAll(&all)(cmd, args)
	}
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			ids, err := selectVMs(cmd, m, args, all, func(smolvm.VMState) bool { return true })
			if err != nil {
				return err
			}
			remove := func(id string) (string, error) {
				err := m.Delete(cmd.Context(), id, options)
				if err != nil && (force || all) && errors.Is(err, smolvm.ErrVMNotFound) {
					return "", nil
				}
				return id, err
			}
			return eachOf(ids, remove, a.printRemoved)
		})
	})
	return cmd
}

func (a *app) printRemoved(id string) error {
	if id == "" {
		return nil
	}
	return a.println(id)
}
