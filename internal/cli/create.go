package cli

import (
	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const createLong = `Create a VM, without starting it, and print its id.

The VM boots IMAGE, by default ` + "`base`" + `, which is built when it is first needed. An image
of a registry, such as python:3.12-slim, is pulled if it is missing; commands in the VM
have its environment, working directory and user. The VM keeps its disk, its port
forwards and its SSH port until it is removed.

With --kernel the VM boots files of your own instead, as they are: there is no agent in
it, so you reach it by its console log, its ports and its own SSH server.`

const createExample = `  smolvm create --name web -p 8080:80
  smolvm create --vcpus 4 --memory 2G --disk-size 8G
  smolvm create --kernel vmlinux --rootfs disk.ext4 --boot-args "console=ttyS0"`

func (a *app) createCommand() *cobra.Command {
	var flags vmFlags
	var retain bool
	cmd := &cobra.Command{
		Use:               "create [flags] [IMAGE]",
		Short:             "Create a VM",
		Long:              createLong,
		Example:           createExample,
		Args:              needs(0, 1, "at most one image"),
		ValidArgsFunction: first(a.imageNames()),
	}
	flags.register(cmd)
	cmd.Flags().StringVarP(&flags.config.WorkingDir, "workdir", "w", "", "run commands in the directory `DIR` (default: the image's, else the user's home)")
	cmd.Flags().StringVarP(&flags.config.User, "user", "u", "", "run commands as `USER[:GROUP]`, by names or numbers (default: the image's, else root)")
	complete(cmd, "workdir", words())
	complete(cmd, "user", words())
	cmd.Flags().BoolVar(&retain, "retain-disk", false, "keep the disk when the VM is removed, for the next VM of the same id")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		var image string
		if len(args) > 0 {
			image = args[0]
		}
		config, err := flags.resolve(a, image)
		if err != nil {
			return err
		}
		config.RetainDisk = retain
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			vm, err := m.Create(cmd.Context(), config, flags.creation(a))
			if err != nil {
				return err
			}
			a.progress.finish()
			if image != "" {
				a.tellHidden(cmd.Context(), m, image)
			}
			return a.printVM(vm)
		})
	})
	return cmd
}

// printVM prints what a command has made of a VM: its id, or all as JSON.
func (a *app) printVM(vm smolvm.VMInfo) error {
	if a.json {
		return a.printJSON(vm)
	}
	return a.println(vm.ID)
}
