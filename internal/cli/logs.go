package cli

import (
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const logsLong = `Print the guest's console: what its kernel and its agent have printed in all runs of the
VM. The output of commands is not in it. If it is longer than 4 MiB, its beginning is
dropped.

On a terminal only text and colours are shown, as a guest could send control sequences to
it. With --raw, and where the output is no terminal, every byte is passed on as it is.`

func (a *app) logsCommand() *cobra.Command {
	var options smolvm.LogOptions
	var raw bool
	cmd := &cobra.Command{
		Use:               "logs [flags] ID",
		Short:             "Print a VM's console log",
		Long:              logsLong,
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs()),
	}
	cmd.Flags().BoolVarP(&options.Follow, "follow", "f", false, "go on until the VM stops")
	cmd.Flags().IntVarP(&options.Tail, "tail", "n", 0, "only the last `N` lines")
	cmd.Flags().BoolVar(&raw, "raw", false, "let the guest's control sequences reach the terminal")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		if options.Tail < 0 || (options.Tail == 0 && cmd.Flags().Changed("tail")) {
			return usagef("--tail: give a number from 1 up")
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			log, err := m.Logs(cmd.Context(), args[0], options)
			if err != nil {
				return err
			}
			var out io.Writer = a.Stdout
			if raw {
				out = a.Stdout.raw
			}
			_, err = io.Copy(out, log)
			return errors.Join(err, log.Close())
		})
	})
	return cmd
}
