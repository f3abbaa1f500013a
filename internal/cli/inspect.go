package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const inspectLong = `Print everything that is known of VMs, as JSON: one object for each id, one after the other,
so that ` + "`smolvm inspect web | jq .state`" + ` works.`

// inspected is what inspect prints of a VM.
type inspected struct {
	smolvm.VMInfo
	SSH smolvm.SSHAccess `json:"ssh"`
	// Usage is nil if the VM does not run.
	Usage *smolvm.Usage `json:"usage,omitempty"`
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
					return inspect(cmd.Context(), m, id)
				}, func(vm inspected) error { return a.printJSON(vm) })
			})
		}),
	}
}

// inspect returns all that is known of a VM.
func inspect(ctx context.Context, m smolvm.Service, id string) (inspected, error) {
	vm, err := m.Get(ctx, id)
	if err != nil {
		return inspected{}, err
	}
	all := inspected{VMInfo: vm}
	if vm.State.Alive() {
		usage, err := m.Usage(ctx, id)
		switch {
		case err == nil:
			all.Usage = &usage
		case ctx.Err() != nil:
			return all, err
		}
		// Otherwise it has ended meanwhile, or its shim is of a version that does not measure.
	}
	if vm.Network.Mode.Forwards() { // else there is no way for a client of its own
		all.SSH, err = m.SSH(ctx, id, smolvm.SSHOptions{})
	}
	return all, err
}
