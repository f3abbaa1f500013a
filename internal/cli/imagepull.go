package cli

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const imagePullLong = `Fetch an image from its registry, make it bootable, and print its digest. Layers that
are here are not fetched again, and one that was cut off goes on where it was.

NAME is as docker has it: python is docker.io/library/python:latest. Credentials are those
that docker login and podman login have stored. Registries on this host itself may speak
plain http.`

// tellHidden tells that a name means an image that was built here, and not the one of a registry
// that is here too.
func (a *app) tellHidden(ctx context.Context, m smolvm.Service, name string) {
	found, err := m.Image(ctx, name)
	if err != nil || !slices.Contains(found.Names, name) || len(found.Hides) == 0 {
		return
	}
	a.errorf("smolvm: %s is the image that was built here; that of the registry is reached as %s", name, strings.Join(found.Hides, ", "))
}

func (a *app) imagePullCommand() *cobra.Command {
	var options smolvm.PullOptions
	var quiet bool
	cmd := &cobra.Command{
		Use:               "pull [flags] NAME",
		Short:             "Fetch an image from a registry",
		Long:              imagePullLong,
		Example:           "  smolvm image pull python:3.12-slim\n  smolvm image pull ghcr.io/owner/image@sha256:…",
		Args:              needs(1, 1, "the name of an image"),
		ValidArgsFunction: words(),
	}
	cmd.Flags().StringVar(&options.Platform, "platform", "", "`OS/ARCH` that the image is for, as in linux/arm64 (default: this host's)")
	quietFlag(cmd, &quiet)
	complete(cmd, "platform", words())
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		options.Progress = a.showProgress(quiet)
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			image, err := m.PullImage(cmd.Context(), args[0], options)
			if err != nil {
				return err
			}
			a.progress.finish()
			a.tellHidden(cmd.Context(), m, args[0])
			return a.printImage(image)
		})
	})
	return cmd
}
