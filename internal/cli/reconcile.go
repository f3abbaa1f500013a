package cli

import (
	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const reconcileLong = `Clean up after a crash: VMs that are recorded as running and are dead get the state error,
and what removed VMs have left is removed. The ids of all VMs that have failed since the
last reconcile are printed. Nothing depends on this command: every other command does the
same for the VMs that it looks at.`

func (a *app) reconcileCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "reconcile",
		Short:             "Clean up after a crash",
		Long:              reconcileLong,
		Args:              needs(0, 0, "no arguments"),
		ValidArgsFunction: words(),
		RunE: a.does(func(cmd *cobra.Command, _ []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				dead, err := m.Reconcile(cmd.Context())
				if err != nil {
					return err
				}
				if a.json {
					return printList(a, dead)
				}
				for _, id := range dead {
					if err := a.println(id); err != nil {
						return err
					}
				}
				return nil
			})
		}),
	}
}
