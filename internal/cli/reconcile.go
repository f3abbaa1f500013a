package cli

import (
	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const reconcileLong = `Make what is written down agree with what is so, after a crash: VMs that are said to
run but are dead get the state error; what is left of VMs that are gone is removed. The
ids of all VMs that have failed while they ran since the last time are printed. Nothing
depends on it: every other command does the same for the VMs that it looks at.`

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
