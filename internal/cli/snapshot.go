package cli

import (
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const snapshotLong = `A snapshot is a VM as it was at some moment: memory, devices and disk. Any number of
VMs can be restored from it, each with an identity of its own.`

func (a *app) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "snapshot", Short: "Save VMs, and restore them", Long: snapshotLong,
		Args: cobra.ArbitraryArgs, RunE: a.requireSubcommand,
	}
	cmd.AddCommand(a.snapshotCreateCommand(), a.snapshotLsCommand(), a.snapshotRestoreCommand(), a.snapshotRmCommand())
	return cmd
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var options smolvm.SnapshotOptions
	cmd := &cobra.Command{
		Use:   "create [flags] ID",
		Short: "Save a running VM, and print the snapshot's name",
		Long: `Save a running or paused VM, and print the snapshot's name. A running VM goes on: it is
paused for some hundredths of a second at the end, longer if it changes much memory.`,
		Example:           "  smolvm snapshot create --name ready web",
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs(smolvm.StateRunning, smolvm.StatePaused)),
	}
	cmd.Flags().StringVar(&options.Name, "name", "", "`NAME` of the snapshot (default: the VM's id and the time)")
	complete(cmd, "name", words())
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			snapshot, err := m.CreateSnapshot(cmd.Context(), args[0], options)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(snapshot)
			}
			a.errorf("smolvm: VM %s was held for %s", snapshot.VMID, took(snapshot.Pause))
			return a.println(snapshot.Name)
		})
	})
	return cmd
}

func (a *app) snapshotLsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List snapshots",
		Args: needs(0, 0, "no arguments"), ValidArgsFunction: words(),
	}
	cmd.RunE = a.does(func(cmd *cobra.Command, _ []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			snapshots, err := m.Snapshots(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return printList(a, snapshots)
			}
			now := time.Now()
			t := &table{titles: []string{"NAME", "VM", "IMAGE", "CPUS", "MEMORY", "SIZE", "AGE"}, shrinks: []int{0}}
			for _, one := range snapshots {
				t.add(one.Name, one.VMID, shortDigest(one.Image), strconv.Itoa(one.Config.VCPUs), mebibytes(one.Config.MemoryMiB),
					byteSize(one.Size), age(one.CreatedAt, now))
			}
			return a.print(t)
		})
	})
	return cmd
}

func (a *app) snapshotRestoreCommand() *cobra.Command {
	var options smolvm.RestoreOptions
	var egress egressFlags
	cmd := &cobra.Command{
		Use:   "restore [flags] NAME",
		Short: "Make a VM that goes on from a snapshot, and print its id",
		Long: `Make a VM that goes on from a snapshot, and print its id. It has an identity of its own,
and none of the connections of the VM that was saved.

If the snapshot's memory can't be used, because it is damaged or QEMU was upgraded
since, that is an error, and no VM is made. With --allow-cold the VM then boots from the
snapshot's disk, with a warning; with --cold it always boots from there.

With --in-place no new VM is made. The saved VM, which must be stopped, goes back to the
snapshot under its own id; what was written to its disk since is lost. If that fails, the
VM stays as it is. For a VM with a kernel of its own this is the only way, as its guest
has no agent to give it another identity.

The VM has the egress policy of the saved one, or a narrower one that is given. The values of
its secrets have to be where they come from, unless it is to have none.`,
		Example: "  smolvm snapshot restore ready\n  smolvm snapshot restore --id web-2 ready\n  smolvm snapshot restore --in-place ready",
		Args:    needs(1, 1, "the name of a snapshot"),
	}
	cmd.Flags().StringVar(&options.ID, "id", "", "`ID` of the VM (default: that of the saved VM if it is gone, else made up)")
	complete(cmd, "id", words())
	cmd.Flags().BoolVar(&options.InPlace, "in-place", false, "have the saved VM itself go back to the snapshot")
	egress.register(cmd)
	withoutSecretsFlag(cmd, &options.WithoutSecrets)
	startFlags(cmd, &options.Start)
	allowColdFlag(cmd, &options.AllowCold)
	timings := timingsFlag(cmd)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) (err error) {
		if options.Egress, err = egress.policy(); err != nil {
			return err
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			vm, err := m.RestoreSnapshot(cmd.Context(), args[0], options)
			if err != nil {
				return err
			}
			return a.printStarted(vm, *timings)
		})
	})
	return cmd
}

func (a *app) snapshotRmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME...", Aliases: []string{"delete"}, Short: "Remove snapshots", Long: "Remove snapshots. VMs that were restored from them go on.",
		Args: needs(1, anyNumber, "the names of snapshots"),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				return eachOf(args, func(name string) (string, error) { return name, m.RemoveSnapshot(cmd.Context(), name) }, a.println)
			})
		}),
	}
}

func (a *app) forkCommand() *cobra.Command {
	var options smolvm.ForkOptions
	var egress egressFlags
	cmd := &cobra.Command{
		Use:   "fork [flags] ID",
		Short: "Make copies of a running VM, and print their ids",
		Long: `Make copies of a running VM, and print their ids. Each goes on from the VM's present
state, with the same memory and disk, and an identity of its own. The VM itself is paused
for some hundredths of a second, and goes on. If one copy can't be made, none is.

Copies have the VM's egress policy, or a narrower one that is given. The values of its secrets
have to be where they come from, unless copies are to have none.`,
		Example:           "  smolvm fork -n 3 web",
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs(smolvm.StateRunning, smolvm.StatePaused)),
	}
	cmd.Flags().IntVarP(&options.Count, "count", "n", 1, "make `N` copies")
	cmd.Flags().StringSliceVar(&options.IDs, "id", nil, "`ID` of a copy (repeatable; default: made up)")
	complete(cmd, "count", words())
	complete(cmd, "id", words())
	egress.register(cmd)
	withoutSecretsFlag(cmd, &options.WithoutSecrets)
	startFlags(cmd, &options.Start)
	allowColdFlag(cmd, &options.AllowCold)
	timings := timingsFlag(cmd)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) (err error) {
		if options.Egress, err = egress.policy(); err != nil {
			return err
		}
		if options.Count < 1 {
			return usagef("%d copies can't be made; give a number from 1 up", options.Count)
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			forked, err := m.Fork(cmd.Context(), args[0], options)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(forked)
			}
			a.errorf("smolvm: VM %s was held for %s", args[0], took(forked.Pause))
			for _, child := range forked.Children {
				if err := a.printStarted(child, *timings); err != nil {
					return err
				}
			}
			return nil
		})
	})
	return cmd
}

// allowColdFlag adds the flag that allows a boot if the saved memory of a VM can't be used.
func allowColdFlag(cmd *cobra.Command, allow *bool) {
	cmd.Flags().BoolVar(allow, "allow-cold", false, "if the saved memory can't be used, boot from the disk, with a warning")
}

// timingsFlag adds the flag that has the phases of a start printed, and returns its value.
func timingsFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("timings", false, "print on standard error how the VM was started and how long each phase took")
}

// startTimeline returns the phases of a VM's last start.
func startTimeline(vm smolvm.VMInfo) []smolvm.Phase {
	if vm.Start == nil {
		return nil
	}
	return vm.Start.Timeline
}

// printStarted prints what a command has started.
func (a *app) printStarted(vm smolvm.VMInfo, timings bool) error {
	a.tellStart(vm, timings)
	if timings {
		printPhases(a.Stderr, startTimeline(vm))
	}
	return a.printVM(vm)
}
