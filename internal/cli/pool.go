package cli

import (
	"strconv"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const poolLong = `A pool keeps VMs of some kind ready: booted, taken through a first command, and held.
A start of such a VM takes one of them, gives it its identity, and has the next one
made. Each takes the memory of an idle VM. No process keeps a pool: what is taken is
made again by the one that takes it.`

func (a *app) poolCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "pool", Short: "Keep VMs ready", Long: poolLong,
		Args: cobra.ArbitraryArgs, RunE: a.requireSubcommand,
	}
	cmd.AddCommand(a.poolSetCommand(), a.poolLsCommand(), a.poolRmCommand())
	return cmd
}

func (a *app) poolSetCommand() *cobra.Command {
	var kind kindFlags
	cmd := &cobra.Command{
		Use:               "set [flags] N [IMAGE]",
		Short:             "Keep N VMs ready, and print the pool's id",
		Long:              "Keep N VMs of some kind ready, wait until they are, and print the pool's id.",
		Example:           "  smolvm pool set 4\n  smolvm pool set --memory 1G 2 python",
		Args:              needs(1, 2, "a number of VMs, and at most one image"),
		ValidArgsFunction: words(),
	}
	kind.register(cmd)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		size, err := strconv.Atoi(args[0])
		if err != nil {
			return usagef("%q is no number of VMs", args[0])
		}
		options := smolvm.PoolOptions{Size: size, VCPUs: kind.vcpus, MemoryMiB: kind.memory, DiskSizeMiB: kind.disk, WarmUp: kind.warmUp, Network: kind.network}
		if len(args) > 1 {
			options.Image = args[1]
		}
		options.Progress = a.showProgress(false)
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			pool, err := m.SetPool(cmd.Context(), options)
			a.progress.finish()
			if err != nil {
				return err
			}
			return a.printPool(pool)
		})
	})
	return cmd
}

func (a *app) printPool(pool smolvm.Pool) error {
	if a.json {
		return a.printJSON(pool)
	}
	return a.println(pool.ID)
}

func (a *app) poolLsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List pools",
		Args: needs(0, 0, "no arguments"), ValidArgsFunction: words(),
	}
	cmd.RunE = a.does(func(cmd *cobra.Command, _ []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			pools, err := m.Pools(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return printList(a, pools)
			}
			t := &table{titles: []string{"ID", "READY", "SIZE", "IMAGE", "CPUS", "MEMORY", "WARM-UP"}, shrinks: []int{6}}
			for _, one := range pools {
				t.add(one.ID, strconv.Itoa(one.Ready), strconv.Itoa(one.Size), shortDigest(one.Image), strconv.Itoa(one.VCPUs), mebibytes(one.MemoryMiB), one.WarmUp)
			}
			return a.print(t)
		})
	})
	return cmd
}

func (a *app) poolRmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm ID...", Aliases: []string{"delete"}, Short: "Remove pools, with the VMs that are ready in them",
		Args: needs(1, anyNumber, "the ids of pools"),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				return eachOf(args, func(id string) (string, error) { return id, m.RemovePool(cmd.Context(), id) }, a.println)
			})
		}),
	}
}
