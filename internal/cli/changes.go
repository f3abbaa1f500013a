package cli

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

func (a *app) diffCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "diff ID",
		Short: "List what a guest has changed in directories of the host",
		Long: `List what a guest has changed in directories of the host that it has as overlays
(-v DIR:TARGET:overlay), as far as the host does not have it: A for what it has added, C for
what it has changed, D for what it has deleted. ` + "`smolvm apply`" + ` brings it to the host.`,
		Example:           "  smolvm diff box",
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs(smolvm.StateRunning)),
	}
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			changes, err := m.Changes(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.printChanges(changes)
		})
	})
	return cmd
}

func (a *app) applyCommand() *cobra.Command {
	var opts smolvm.ApplyOptions
	cmd := &cobra.Command{
		Use:   "apply [flags] ID",
		Short: "Bring what a guest has changed to directories of the host",
		Long: `Bring what a guest has changed in directories of the host that it has as overlays
(-v DIR:TARGET:overlay) to these directories, and list it as ` + "`smolvm diff`" + ` does.

Nothing is written if a file has changed on the host, too, since the VM was created or its
changes were last applied, unless --force says that the guest's is to take its place. Each file
is the old or the new one at any time. Set-id bits and owners are not brought back.`,
		Example:           "  smolvm apply box",
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs(smolvm.StateRunning)),
	}
	cmd.Flags().BoolVarP(&opts.Force, "force", "f", false, "replace what has changed on the host, too")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			changes, err := m.Apply(cmd.Context(), args[0], opts)
			if err != nil {
				return err
			}
			return a.printChanges(changes)
		})
	})
	return cmd
}

// printChanges prints changes, one a line. Their paths are a guest's.
func (a *app) printChanges(changes []smolvm.Change) error {
	if a.json {
		return a.printJSON(changes)
	}
	for _, change := range changes {
		line := strings.ReplaceAll(termsafe.Text(change.String()), "\n", "\uFFFD")
		if err := a.println(line); err != nil {
			return err
		}
	}
	return nil
}
