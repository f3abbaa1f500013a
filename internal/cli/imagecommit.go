package cli

import (
	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const imageCommitLong = `Make an image of a VM, and print its digest: of the layers of the VM's image and one
of what differs in its root file system, or one of all of it where the image has no
layers, as base. Memory, processes and what is mounted in the guest are no part of it.

Commands in a VM that runs are held meanwhile. A VM that does not run is started for it,
and stopped again. NAME is as docker has it; without one the image has its digest only,
and image prune removes it.`

func (a *app) imageCommitCommand() *cobra.Command {
	var options smolvm.CommitOptions
	var quiet bool
	cmd := &cobra.Command{
		Use:               "commit [flags] ID [NAME]",
		Short:             "Make an image of a VM",
		Long:              imageCommitLong,
		Example:           "  smolvm image commit web app:1\n  smolvm image commit -m 'with nginx' -c 'CMD [\"nginx\"]' web ghcr.io/owner/app",
		Args:              needs(1, 2, "the id of a VM, and the name that its image gets"),
		ValidArgsFunction: first(a.vmIDs(smolvm.StateRunning, smolvm.StateStopped)),
	}
	flags := cmd.Flags()
	flags.StringVarP(&options.Author, "author", "a", "", "`NAME` of who made it")
	flags.StringVarP(&options.Message, "message", "m", "", "`TEXT` that says what it is")
	flags.StringArrayVarP(&options.Changes, "change", "c", nil, "`INSTRUCTION` of a Dockerfile that changes the configuration, as in 'CMD [\"serve\"]'")
	flags.BoolVar(&options.NoPause, "no-pause", false, "let the VM's commands go on meanwhile")
	quietFlag(cmd, &quiet)
	complete(cmd, "author", words())
	complete(cmd, "change", words())
	complete(cmd, "message", words())
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		options.Progress = a.showProgress(quiet)
		name := ""
		if len(args) > 1 {
			name = args[1]
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			image, err := m.CommitImage(cmd.Context(), args[0], name, options)
			if err != nil {
				return err
			}
			a.progress.finish()
			return a.printImage(image)
		})
	})
	return cmd
}
