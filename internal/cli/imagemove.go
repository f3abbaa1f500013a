package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const imageImportLong = `Take images from a file, make them bootable, and print their digests.

FILE is an archive of docker save or podman save, or an OCI layout: a tar archive, or a
directory. - reads an archive from standard input. With --daemon the image NAME is taken
from the daemon of docker or podman that runs here.`

func (a *app) imageImportCommand() *cobra.Command {
	var options smolvm.ImportOptions
	var quiet bool
	cmd := &cobra.Command{
		Use:     "import [flags] FILE|DIR|-",
		Aliases: []string{"load"},
		Short:   "Take images from an archive, an OCI layout, or docker",
		Long:    imageImportLong,
		Example: "  docker save app | smolvm image import -\n  smolvm image import --name app:1 layout/\n  smolvm image import --daemon app",
		Args:    needs(1, 1, "a file, a directory, or -"),
	}
	flags := cmd.Flags()
	flags.StringVar(&options.Name, "name", "", "give the image the name `NAME` (default: those that it has)")
	flags.BoolVar(&options.Daemon, "daemon", false, "take the image that the argument names from docker or podman")
	flags.StringVar(&options.Socket, "socket", "", "socket of --daemon at `PATH` (default: the first of the usual ones that has the image)")
	flags.StringVar(&options.Platform, "platform", "", "`OS/ARCH` that the image is for (default: this host's)")
	quietFlag(cmd, &quiet)
	complete(cmd, "name", words())
	complete(cmd, "platform", words())
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		release, err := importFrom(a, args[0], &options)
		if err != nil {
			return err
		}
		defer release()
		options.Progress = a.showProgress(quiet)
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			images, err := m.ImportImage(cmd.Context(), options)
			if err != nil {
				return err
			}
			a.progress.finish()
			for _, image := range images {
				if err := a.printImage(image); err != nil {
					return err
				}
			}
			return nil
		})
	})
	return cmd
}

// importFrom fills in where images are imported from.
func importFrom(a *app, from string, options *smolvm.ImportOptions) (release func(), err error) {
	release = func() {}
	switch {
	case options.Daemon && options.Name != "":
		return release, usagef("the image that --daemon takes keeps its name; `smolvm image tag` gives it another")
	case options.Daemon:
		options.Name = from
		return release, nil
	case from == "-":
		options.Archive = a.Stdin
		return release, nil
	}
	info, err := os.Stat(from)
	if err != nil {
		return release, err
	}
	if info.IsDir() {
		options.Dir = from
		return release, nil
	}
	file, err := os.Open(from)
	if err != nil {
		return release, err
	}
	options.Archive = file
	return func() { _ = file.Close() }, nil
}

const imageExportLong = `Write an image as an archive that docker load, podman load and image import read: an OCI
layout as tar. It goes to standard output, or to --output; a directory becomes an OCI
layout.`

func (a *app) imageExportCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:               "export [flags] IMAGE",
		Aliases:           []string{"save"},
		Short:             "Write an image as an archive or an OCI layout",
		Long:              imageExportLong,
		Example:           "  smolvm image export app | docker load\n  smolvm image export -o app.tar app\n  smolvm image export -o layout/ app",
		Args:              needs(1, 1, "the name or digest of an image"),
		ValidArgsFunction: first(a.imageNames()),
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "write to the file `PATH`, or to a directory, which ends with / or is there")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		if _, isTerminal := terminal(a.Stdout); (output == "" || output == "-") && isTerminal {
			return usagef("an archive is not for a terminal; use -o FILE, or a pipe")
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			return exportTo(cmd.Context(), m, args[0], output, a.Program.Stdout)
		})
	})
	return cmd
}

// exportTo writes an image to a file, to a directory, or if neither is named to w.
func exportTo(ctx context.Context, m smolvm.Service, ref, output string, w io.Writer) error {
	if output == "" || output == "-" {
		return m.ExportImage(ctx, ref, smolvm.ExportOptions{Archive: w})
	}
	if info, err := os.Stat(output); strings.HasSuffix(output, "/") || err == nil && info.IsDir() {
		return m.ExportImage(ctx, ref, smolvm.ExportOptions{Dir: output})
	}
	if _, err := m.Image(ctx, ref); err != nil {
		return err // before a file is made
	}
	file, err := os.Create(output)
	if err != nil {
		return err
	}
	return closeWritten(file, m.ExportImage(ctx, ref, smolvm.ExportOptions{Archive: file}))
}

// closeWritten closes a file that was written, and removes it if it is not whole. It returns the error
// of the writing, or of the closing. The file may be nil.
func closeWritten(file *os.File, err error) error {
	if file == nil {
		return err
	}
	err = errors.Join(err, file.Close())
	if info, statErr := os.Stat(file.Name()); err != nil && statErr == nil && info.Mode().IsRegular() {
		_ = os.Remove(file.Name())
	}
	return err
}

func (a *app) imagePushCommand() *cobra.Command {
	var options smolvm.PushOptions
	var quiet bool
	cmd := &cobra.Command{
		Use:               "push [flags] NAME",
		Short:             "Send an image to the registry of its name",
		Long:              "Send an image to the registry of its name, which smolvm image tag gives it. Credentials\nare those that docker login and podman login have stored.",
		Args:              needs(1, 1, "the name of an image"),
		ValidArgsFunction: first(a.imageNames()),
	}
	quietFlag(cmd, &quiet)
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		options.Progress = a.showProgress(quiet)
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			if err := m.PushImage(cmd.Context(), args[0], options); err != nil {
				return err
			}
			a.progress.finish()
			return nil
		})
	})
	return cmd
}

func (a *app) imageTagCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "tag IMAGE NAME",
		Short:             "Give an image of a registry another name",
		Args:              needs(2, 2, "an image, and its new name"),
		ValidArgsFunction: first(a.imageNames()),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				_, err := m.TagImage(cmd.Context(), args[0], args[1])
				return err
			})
		}),
	}
}

func (a *app) imageHistoryCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "history IMAGE",
		Short:             "List the steps by which an image was made, the last first",
		Args:              needs(1, 1, "the name or digest of an image"),
		ValidArgsFunction: first(a.imageNames()),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				steps, err := m.ImageHistory(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				if a.json {
					return printList(a, steps)
				}
				now := time.Now()
				t := &table{titles: []string{"LAYER", "AGE", "SIZE", "CREATED BY"}, shrinks: []int{3}}
				for _, step := range slices.Backward(steps) {
					since := ""
					if !step.CreatedAt.IsZero() {
						since = age(step.CreatedAt, now)
					}
					t.add(shortDigest(step.Layer), since, byteSize(step.Size), step.CreatedBy)
				}
				return a.print(t)
			})
		}),
	}
}
