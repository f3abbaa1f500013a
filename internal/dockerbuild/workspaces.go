package dockerbuild

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"runtime"
	"slices"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/imagebuild"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/workspace"
)

// rootKey is the key in the cache of builds by which the files of an image of our own are found.
func rootKey(own smolvm.Image) string {
	sum := sha256.Sum256([]byte("root of " + own.Digest))
	return hex.EncodeToString(sum[:])
}

// opener opens workspaces for a build.
type opener struct {
	builder *Builder
	found   *finder
	vm      smolvm.VMConfig
}

// Open implements [imagebuild.Workspaces].
func (o *opener) Open(ctx context.Context, layers []ocistore.Layer) (imagebuild.Workspace, error) {
	image, err := o.image(ctx, layers)
	if err != nil {
		return nil, err
	}
	opened, err := o.builder.Workspace(ctx, image, workspace.Options{VM: o.vm})
	if err != nil {
		return nil, err
	}
	return work{opened}, nil
}

// image returns a bootable image of layers: the one that a stage is based on, of which there may
// be a template, or one without a name. Who builds again with other commands behind the same
// layers has it already.
func (o *opener) image(ctx context.Context, layers []ocistore.Layer) (smolvm.Image, error) {
	for _, found := range o.found.found {
		if !slices.EqualFunc(found.Layers, layers, func(a, b ocistore.Layer) bool { return a.DiffID == b.DiffID }) {
			continue
		}
		if found.oci == nil {
			return found.own, nil
		}
		return o.builder.Catalog.Boot(ctx, *found.oci, nil)
	}
	config := fmt.Appendf(nil, `{"architecture":%q,"os":"linux","config":{},"rootfs":{"type":"layers"}}`, runtime.GOARCH)
	oci, err := o.builder.Catalog.OCI.AddImage(ctx, ociref.Ref{}, config, layers)
	if err != nil {
		return smolvm.Image{}, err
	}
	return o.builder.Catalog.Boot(ctx, oci, nil)
}

// work is a workspace as the build sees it.
type work struct{ *workspace.Workspace }

// Run implements [imagebuild.Workspace].
func (w work) Run(ctx context.Context, command imagebuild.Command) (smolvm.ExitStatus, error) {
	inner := workspace.Command{
		Args: command.Args, Env: command.Env, Dir: command.Dir, User: command.User,
		Stdout: command.Stdout, Stderr: command.Stderr, NoNetwork: command.NoNetwork,
	}
	for _, mount := range command.Mounts {
		inner.Mounts = append(inner.Mounts, workspace.Mount(mount))
	}
	return w.Workspace.Run(ctx, inner)
}
