package cli

import (
	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const inspectLong = `Print everything that is known of VMs, as JSON: one object for each id, one after the other,
so that ` + "`smolvm inspect web | jq .state`" + ` works.`

// inspected is what inspect prints of a VM.
type inspected struct {
	smolvm.VMInfo
	SSH smolvm.SSHAccess `json:"ssh"`
}

func (a *app) inspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "inspect ID...",
		Short:             "Print everything that is known of VMs, as JSON",
		Long:              inspectLong,
		Args:              needs(1, anyNumber, "the ids of VMs"),
		ValidArgsFunction: a.vmIDs(),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				return eachOf(args, func(id string) (inspected, error) {
					vm, err := m.Get(cmd.Context(), id)
					if err != nil {
						return inspected{}, err
					}
					if !vm.Network.Mode.Forwards() { // there is no way for a client of its own
						return inspected{VMInfo: vm}, nil
					}
					ssh, err := m.SSH(cmd.Context(), id, smolvm.SSHOptions{})
					return inspected{vm, ssh}, err
				}, func(vm inspected) error { return a.printJSON(vm) })
			})
		}),
	}
}
