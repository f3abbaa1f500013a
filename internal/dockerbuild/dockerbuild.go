// Package dockerbuild builds images from Dockerfiles, from the context that a user has to an image
// that VMs boot: it reads the Dockerfile and the context, finds the images that stages are
// based on, has package imagebuild make the layers, with workspaces for commands, and stores
// the image under its names.
package dockerbuild

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/catalog"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/workspace"
)

// Builder builds images.
type Builder struct {
	Catalog *catalog.Catalog
	// Workspace opens a workspace of an image.
	Workspace func(ctx context.Context, image smolvm.Image, opts workspace.Options) (*workspace.Workspace, error)
	// Root writes the files of an image that has no layers, as the archive of one.
	Root func(ctx context.Context, image smolvm.Image, w io.Writer) error
	// BuiltIn returns the image of a name that is built in, as the catalog has it, and builds it if
	// it is missing.
	BuiltIn func(ctx context.Context, name string) (smolvm.Image, error)
	// CacheDir is where the content of cache mounts is kept, and that of files while they are
	// copied.
	CacheDir string
}

// Build builds an image. The errors of a Dockerfile and of its steps are of type
// [*smolvm.DockerfileError].
func (b *Builder) Build(ctx context.Context, opts smolvm.DockerfileOptions) (smolvm.Image, error) {
	tags, err := b.tags(ctx, opts.Tags)
	if err != nil {
		return smolvm.Image{}, err
	}
	if err := catalog.CheckPlatform(opts.Platform); err != nil {
		return smolvm.Image{}, err
	}
	epoch, err := epochOf(opts.Args)
	if err != nil {
		return smolvm.Image{}, err
	}
	// Content that is copied has no name there, so none is left.
	if err := os.MkdirAll(b.CacheDir, 0o700); err != nil {
		return smolvm.Image{}, err
	}
	in, err := open(ctx, opts, b.CacheDir)
	if err != nil {
		return smolvm.Image{}, err
	}
	defer in.close()
	release, err := b.Catalog.OCI.Hold(ctx)
	if err != nil {
		return smolvm.Image{}, err
	}
	defer release()
	if opts.Progress == nil {
		opts.Progress = func(smolvm.BuildEvent) {}
	}
	found := &finder{builder: b, pull: opts.Pull, found: map[string]*foundImage{}, progress: opts.Progress}
	plan, err := dockerfile.New(ctx, in.text, dockerfile.Options{
		Name: in.name, Target: opts.Target, Args: opts.Args, Labels: opts.Labels, Arch: runtime.GOARCH, Base: found.config,
	})
	if err != nil {
		return smolvm.Image{}, err
	}
	for _, warning := range plan.Warnings {
		text := warning.Text
		if warning.Line > 0 {
			text = fmt.Sprintf("%s:%d: %s", in.name, warning.Line, text)
		}
		opts.Progress(smolvm.BuildEvent{Warning: text})
	}
	result, err := imagebuild.Build(ctx, plan, imagebuild.Options{
		Name: in.name, Context: in.tree, Ignored: in.ignored, Images: found, Store: layerStore{b.Catalog.OCI},
		Workspaces: &opener{builder: b, found: found, vm: opts.VM}, Caches: imagebuild.CacheDir(b.CacheDir),
		Secrets: func(id string) ([]byte, bool, error) { value, ok := opts.Secrets[id]; return value, ok, nil },
		NoCache: opts.NoCache, Epoch: epoch, Arch: runtime.GOARCH, TempDir: b.CacheDir, Progress: opts.Progress, Shown: found.shown,
	})
	if err != nil {
		return smolvm.Image{}, err
	}
	step.Reached(ctx, "image build/built")
	return b.store(ctx, result, tags, opts.Export)
}

// store stores an image that was built, makes it bootable, and then gives it its names. It is
// written where that is asked for.
func (b *Builder) store(ctx context.Context, result imagebuild.Result, tags []ociref.Ref, export smolvm.ExportOptions) (smolvm.Image, error) {
	oci, err := b.Catalog.OCI.AddImage(ctx, ociref.Ref{}, result.Config, result.Layers)
	if err != nil {
		return smolvm.Image{}, err
	}
	if len(tags) > 0 {
		oci.Name = tags[0].String() // by which it is shown what it was made of
	}
	made, err := b.Catalog.Boot(ctx, oci, nil)
	if err == nil && export.Archive != nil {
		err = b.Catalog.OCI.Export(ctx, oci, export.Archive)
	}
	if err == nil && export.Dir != "" {
		err = b.Catalog.OCI.ExportDir(ctx, oci, export.Dir)
	}
	if err != nil || len(tags) == 0 {
		return made, err
	}
	for _, tag := range tags {
		if err := b.Catalog.OCI.Tag(ctx, oci, tag); err != nil {
			return smolvm.Image{}, err
		}
	}
	return b.Catalog.Find(ctx, made.Digest)
}

// tags reads the names that an image is to get.
func (b *Builder) tags(ctx context.Context, texts []string) ([]ociref.Ref, error) {
	var tags []ociref.Ref
	for _, text := range texts {
		tag, err := b.Catalog.NewName(ctx, text)
		if err != nil {
			return nil, err
		}
		tags = append(tags, tag)
	}
	return tags, nil
}

// epochOf returns the time that SOURCE_DATE_EPOCH has; nil if it is not given.
func epochOf(args map[string]string) (*time.Time, error) {
	text, ok := args["SOURCE_DATE_EPOCH"]
	if !ok || text == "" {
		return nil, nil
	}
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil || seconds < 0 || seconds > 1<<33 {
		return nil, fmt.Errorf("SOURCE_DATE_EPOCH: %q is no number of seconds since 1970", text)
	}
	at := time.Unix(seconds, 0).UTC()
	return &at, nil
}

// layerStore is a store of OCI images as the build sees it.
type layerStore struct{ *ocistore.Store }

// OpenLayer opens a layer as it is stored.
func (s layerStore) OpenLayer(layer ocistore.Layer) (io.ReadCloser, error) {
	return s.Store.OpenLayer(layer)
}
