package cli

import (
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/smolvm/smolvm"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Pull, build, list and remove images",
		Long: `Images are what VMs boot: a kernel and a root file system with smolvm's agent. They
never change. An image is named by a name, its digest, or the beginning of that; images
of registries have docker's names, such as python:3.12-slim or ghcr.io/owner/image:1.`,
		Args: cobra.ArbitraryArgs,
		RunE: a.requireSubcommand,
	}
	cmd.AddCommand(a.imageLsCommand(), a.imagePullCommand(), a.imageBuildCommand(), a.imageKernelCommand(), a.imageCommitCommand(),
		a.imageImportCommand(), a.imageExportCommand(), a.imagePushCommand(), a.imageTagCommand(), a.imageHistoryCommand(), a.imageInspectCommand(),
		a.imageRmCommand(), a.imagePruneCommand())
	return cmd
}

func (a *app) imageLsCommand() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:               "ls [flags]",
		Aliases:           []string{"list"},
		Short:             "List images",
		Args:              needs(0, 0, "no arguments"),
		ValidArgsFunction: words(),
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print digests only")
	cmd.RunE = a.does(func(cmd *cobra.Command, _ []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			images, err := m.Images(cmd.Context())
			switch {
			case err != nil:
				return err
			case a.json:
				return printList(a, images)
			case quiet:
				for _, image := range images {
					if err := a.println(digestOf(image)); err != nil {
						return err
					}
				}
				return nil
			}
			now := time.Now()
			t := &table{titles: []string{"NAMES", "DIGEST", "SIZE", "AGE", "SOURCE"}, shrinks: []int{4, 0}}
			for _, image := range images {
				t.add(strings.Join(image.Names, ", "), shortDigest(digestOf(image)), byteSize(image.Size),
					age(image.CreatedAt, now), image.Source)
			}
			return a.print(t)
		})
	})
	return cmd
}

// digestOf returns the digest by which an image is named: of an OCI image that is not bootable
// yet, that of its manifest.
func digestOf(image smolvm.Image) string {
	if image.Digest == "" && image.OCI != nil {
		return image.OCI.Digest
	}
	return image.Digest
}

const imageBuildLong = `Build an image and print its digest. Without flags it is the default image: the
distribution's kernel, fetched by the host's package manager, and a small busybox
system. Packages and images that are there already are used again.

With the path of a directory, which has a slash or is . or .., with - or with one of the
flags for Dockerfiles, such as -t, it is built from a Dockerfile, as docker build does:
COPY takes files from that directory, its context, and RUN runs in a VM. What was built
before is used again, step by step. With - the context is an archive by tar on stdin, or
that is a Dockerfile alone.

debian, python, node and dev are images of the distribution's packages; they are built when
they are first run, or by name here, and with --force of newer packages. --packages and
--recipe make others, on hosts with Debian or Ubuntu: packages are fetched by the host's apt
and keys, unpacked without running anything of theirs, and configured in a VM.`

func (a *app) imageBuildCommand() *cobra.Command {
	var options smolvm.BuildOptions
	var dockerfile dockerfileFlags
	var quiet bool
	cmd := &cobra.Command{
		Use:   "build [flags] [NAME | PATH | -]",
		Short: "Build an image, from a Dockerfile, from packages, or from files of one's own",
		Long:  imageBuildLong,
		Example: "  smolvm image build\n  smolvm image build -t app .\n  smolvm image build --rootfs alpine.ext4 alpine\n" +
			"  smolvm image build --packages python3,ffmpeg --name media\n  smolvm image build --force dev",
		Args:              needs(0, 1, "at most one name or path"),
		ValidArgsFunction: first(a.imageNames()),
	}
	flags := cmd.Flags()
	flags.StringVar(&options.Rootfs, "rootfs", "", "root file system: an ext4 image or a directory at `PATH`")
	flags.StringVar(&options.Kernel, "kernel", "", "kernel in `FILE`, as ELF or bzImage")
	flags.StringVar(&options.ModulesDir, "modules", "", "modules of --kernel in `DIR`, as under /lib/modules")
	flags.StringSliceVar(&options.Packages, "packages", nil, "make it of the distribution's packages `NAME,...`")
	flags.StringVar(&options.RecipeFile, "recipe", "", "make it of packages as the recipe in `FILE` says")
	flags.StringVar(&options.Name, "name", "", "name the image `NAME`, as the argument does")
	flags.BoolVar(&options.Force, "force", false, "build even if the same image is there")
	quietFlag(cmd, &quiet)
	complete(cmd, "modules", directories)
	own := flagNames(cmd)
	delete(own, "quiet")
	dockerfile.register(cmd)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		if dockerfile.wanted(cmd, args) {
			for name := range own {
				if cmd.Flags().Changed(name) {
					return usagef("--%s is not for Dockerfiles", name)
				}
			}
			return a.buildDockerfile(cmd, &dockerfile, args, quiet)
		}
		if len(args) > 0 {
			if options.Name != "" && options.Name != args[0] {
				return usagef("the image has two names: give it by --name, or as the argument")
			}
			options.Name = args[0]
		}
		options.Progress = a.showProgress(quiet)
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			image, err := m.BuildImage(cmd.Context(), options)
			if err != nil {
				return err
			}
			a.progress.finish()
			return a.printImage(image)
		})
	})
	return cmd
}

// flagNames returns the names of the flags that a command has so far.
func flagNames(cmd *cobra.Command) map[string]bool {
	names := map[string]bool{}
	cmd.Flags().VisitAll(func(flag *pflag.Flag) { names[flag.Name] = true })
	return names
}

func (a *app) imageInspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "inspect IMAGE...",
		Short:             "Print all that is known of images as JSON, one object for each",
		Args:              needs(1, anyNumber, "names or digests of images"),
		ValidArgsFunction: a.imageNames(),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				return eachOf(args, func(ref string) (smolvm.Image, error) {
					return m.Image(cmd.Context(), ref)
				}, func(image smolvm.Image) error { return a.printJSON(image) })
			})
		}),
	}
}

func (a *app) imageRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm IMAGE...",
		Aliases:           []string{"delete"},
		Short:             "Remove images that no VM uses",
		Args:              needs(1, anyNumber, "names or digests of images"),
		ValidArgsFunction: a.imageNames(),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				return eachOf(args, func(ref string) (string, error) {
					return ref, m.RemoveImage(cmd.Context(), ref)
				}, a.println)
			})
		}),
	}
}

func (a *app) imagePruneCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "prune",
		Short:             "Remove all images that no VM uses and that have no name",
		Args:              needs(0, 0, "no arguments"),
		ValidArgsFunction: words(),
		RunE: a.does(func(cmd *cobra.Command, _ []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				images, err := m.PruneImages(cmd.Context())
				if err != nil {
					return err
				}
				if a.json {
					return printList(a, images)
				}
				var freed int64
				for _, image := range images {
					freed += image.Size
					if err := a.println(image.Digest); err != nil {
						return err
					}
				}
				a.errorf("smolvm: removed %d images, %s", len(images), byteSize(freed))
				return nil
			})
		}),
	}
}

func (a *app) printImage(image smolvm.Image) error {
	if a.json {
		return a.printJSON(image)
	}
	return a.println(image.Digest)
}
