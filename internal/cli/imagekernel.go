package cli

import (
	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const imageKernelLong = `Build a kernel for guests from the distribution's kernel source and a short
configuration, and have images boot with it: base, and those that are made of OCI images,
Dockerfiles and packages, when they are used next. VMs that are there keep the kernel that
they have. Nothing needs it: it boots and runs commands faster than the distribution's,
above all where there is no KVM, and has no modules.

Its security updates are yours: run this again when "apt update" brings a newer source.
It takes gcc, make, flex, bison, bc and the headers of libelf, 3 GB of disk meanwhile, and
a quarter of an hour of a processor. What was interrupted goes on when it is run again.

The path of the kernel is printed. Its configuration and its source are kept beside it:
who passes the kernel on has to offer them. With --reset images boot with the
distribution's kernel again.`

func (a *app) imageKernelCommand() *cobra.Command {
	var options smolvm.KernelOptions
	var reset, quiet bool
	cmd := &cobra.Command{
		Use:   "kernel [flags]",
		Short: "Build a faster kernel for guests, and have images boot with it",
		Long:  imageKernelLong,
		Example: "  smolvm image kernel\n  smolvm image kernel --version 6.12 --jobs 4\n" +
			"  smolvm image build --kernel \"$(smolvm image kernel --no-use)\" small",
		Args:              needs(0, 0, "no arguments"),
		ValidArgsFunction: words(),
	}
	flags := cmd.Flags()
	flags.StringVar(&options.Version, "version", "", "build version `X.Y`, if apt has its source (default: that of the distribution's kernel)")
	flags.IntVar(&options.Jobs, "jobs", 0, "compile `N` files at once (default: as many as there are processors)")
	flags.BoolVar(&options.Force, "force", false, "build even if the same kernel is there")
	flags.BoolVar(&options.Unused, "no-use", false, "build it only: images boot with what they did before")
	flags.BoolVar(&reset, "reset", false, "have images boot with the distribution's kernel again")
	flags.BoolVarP(&quiet, "quiet", "q", false, "don't show progress and notes")
	complete(cmd, "version", words())
	complete(cmd, "jobs", words())
	own := flagNames(cmd)
	delete(own, "reset")
	cmd.RunE = a.does(func(cmd *cobra.Command, _ []string) error {
		if options.Jobs < 0 {
			return usagef("--jobs %d: give how many files are compiled at once", options.Jobs)
		}
		if reset {
			for name := range own {
				if cmd.Flags().Changed(name) {
					return usagef("--%s builds a kernel, and --reset builds none", name)
				}
			}
			return a.withManager(cmd.Context(), func(m smolvm.Service) error { return m.ResetKernel(cmd.Context()) })
		}
		options.Progress = a.showProgress(quiet)
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			kernel, err := m.BuildKernel(cmd.Context(), options)
			if err != nil {
				return err
			}
			a.progress.finish()
			if !quiet {
				a.tellKernel(kernel)
			}
			if a.json {
				return a.printJSON(kernel)
			}
			return a.println(kernel.Path)
		})
	})
	return cmd
}

// tellKernel tells who has built a kernel what that means.
func (a *app) tellKernel(kernel smolvm.Kernel) {
	notes := []string{
		kernel.Name + ": its security updates are yours; run this again when apt update brings a newer source",
		"its configuration and its source, for whoever you pass it on to: " + kernel.ConfigPath + ", " + kernel.SourcePath,
	}
	if kernel.Used {
		notes = append(notes, "images boot with it from now on; smolvm image kernel --reset ends that")
	}
	for _, note := range notes {
		a.errorf("smolvm: %s", note)
	}
}
