package cli

import (
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const templateLong = `A template is a saved VM that others are cloned from, so that they start in a
fraction of the time. Templates are made by themselves, when a VM of some kind has
been started for the first time, and removed again when they take too much of the
disk or when QEMU or smolvm is upgraded.`

func (a *app) templateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "template", Short: "List, build and remove templates, which VMs are cloned from", Long: templateLong,
		Args: cobra.ArbitraryArgs, RunE: a.requireSubcommand,
	}
	cmd.AddCommand(a.templateLsCommand(), a.templateBuildCommand(), a.templateRmCommand(), a.templatePruneCommand())
	return cmd
}

func (a *app) templateLsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List templates",
		Args: needs(0, 0, "no arguments"), ValidArgsFunction: words(),
	}
	cmd.RunE = a.does(func(cmd *cobra.Command, _ []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			templates, err := m.Templates(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return printList(a, templates)
			}
			now := time.Now()
			t := &table{titles: []string{"ID", "IMAGE", "CPUS", "MEMORY", "WARM-UP", "SIZE", "AGE", "USED", "STATE"}, shrinks: []int{4}}
			for _, one := range templates {
				state := "ready"
				if one.Stale {
					state = "stale"
				}
				t.add(one.ID, shortDigest(one.Image), strconv.Itoa(one.VCPUs), mebibytes(one.MemoryMiB), one.WarmUp,
					byteSize(one.Size), age(one.CreatedAt, now), age(one.UsedAt, now), state)
			}
			return a.print(t)
		})
	})
	return cmd
}

// kindFlags are the flags that say which kind of VM a template or a pool is of.
type kindFlags struct {
	vcpus, memory int
	disk          int64
	warmUp        string
	network       smolvm.NetworkMode
}

func (f *kindFlags) register(cmd *cobra.Command) {
	machineFlags(cmd, &f.vcpus, &f.memory, "")
	diskSizeFlag(cmd, &f.disk)
	cmd.Flags().StringVar((*string)(&f.network), "network", "", "`MODE` of the network: user (default), tap (of bridges too) or none")
	complete(cmd, "network", words(string(smolvm.NetworkUser), string(smolvm.NetworkTAP), string(smolvm.NetworkNone)))
	warmUpFlag(cmd, &f.warmUp)
}

func warmUpFlag(cmd *cobra.Command, warmUp *string) {
	cmd.Flags().StringVar(warmUp, "warm-up", "", "shell `LINE` that the guest runs once, before its template is made; clones start with its effects")
	complete(cmd, "warm-up", words())
}

func (a *app) templateBuildCommand() *cobra.Command {
	var kind kindFlags
	var force bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:               "build [flags] [IMAGE]",
		Short:             "Make a template now, and print its id",
		Long:              "Make a template now, instead of after the first start of such a VM, and print its id.\nIf there is one already, its id is printed.",
		Example:           "  smolvm template build\n  smolvm template build --memory 1G --warm-up 'python3 -c \"import numpy\"' python",
		Args:              needs(0, 1, "at most one image"),
		ValidArgsFunction: first(a.imageNames()),
	}
	kind.register(cmd)
	bootTimeoutFlag(cmd, &timeout)
	cmd.Flags().BoolVar(&force, "force", false, "make another one even if there is one")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		options := smolvm.TemplateOptions{VCPUs: kind.vcpus, MemoryMiB: kind.memory, DiskSizeMiB: kind.disk, WarmUp: kind.warmUp, Network: kind.network, Timeout: timeout, Force: force}
		if len(args) > 0 {
			options.Image = args[0]
		}
		options.Progress = a.showProgress(false)
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			template, err := m.BuildTemplate(cmd.Context(), options)
			a.progress.finish()
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(template)
			}
			return a.println(template.ID)
		})
	})
	return cmd
}

func (a *app) templateRmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm ID...", Aliases: []string{"delete"}, Short: "Remove templates", Long: "Remove templates. VMs that were cloned from them go on.",
		Args: needs(1, anyNumber, "the ids of templates"),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				return eachOf(args, func(id string) (string, error) { return id, m.RemoveTemplate(cmd.Context(), id) }, a.println)
			})
		}),
	}
}

func (a *app) templatePruneCommand() *cobra.Command {
	var all bool
	var keep int64
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove templates that are of no use, and print their ids",
		Long: `Remove templates that no new VM can be cloned from. Of the rest, remove the least
recently used ones until all together take no more than --keep.`,
		Args: needs(0, 0, "no arguments"), ValidArgsFunction: words(),
	}
	cmd.Flags().BoolVar(&all, "all", false, "remove all")
	cmd.Flags().Func("keep", "keep templates of `SIZE` together: MiB, or as in 2G (default 4G)", func(text string) error {
		size, err := parseMebibytes(text)
		keep = size << 20
		return err
	})
	cmd.RunE = a.does(func(cmd *cobra.Command, _ []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			removed, err := m.PruneTemplates(cmd.Context(), smolvm.PruneTemplateOptions{MaxBytes: keep, All: all})
			if err != nil {
				return err
			}
			return a.printNames(removed)
		})
	})
	return cmd
}

// printNames prints names, one a line.
func (a *app) printNames(names []string) error {
	if a.json {
		return printList(a, names)
	}
	for _, name := range names {
		if err := a.println(name); err != nil {
			return err
		}
	}
	return nil
}

// tellStart tells on standard error how a VM was started, as far as asked or worth it.
func (a *app) tellStart(vm smolvm.VMInfo, timings bool) {
	if vm.Start == nil {
		return
	}
	for _, warning := range vm.Start.Warnings {
		a.errorf("smolvm: warning: VM %s: %s", vm.ID, warning)
	}
	if !timings {
		return
	}
	source := ""
	if vm.Start.Source != "" {
		source = " of " + vm.Start.Source
	}
	a.errorf("smolvm: VM %s: %s%s, on %s (%s)", vm.ID, vm.Start.Method, source, vm.Start.Backend, vm.Start.Accelerator)
}
