package dockerbuild

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/stream"
)

// finder finds the images of a Dockerfile, each once.
type finder struct {
	builder *Builder
	pull    bool
	found   map[string]*foundImage
	// progress is told what takes long, and shown is how many steps it was told of.
	progress func(smolvm.BuildEvent)
	shown    int
}

// show shows that something begins that takes long. What it returns shows the end.
func (f *finder) show(name string) (event smolvm.BuildEvent, done func(error)) {
	f.shown++
	event = smolvm.BuildEvent{Step: f.shown, Name: "[internal] " + name}
	f.progress(event)
	began := time.Now()
	return event, func(err error) {
		event := event
		event.Done, event.Err, event.Duration = true, err, time.Since(began)
		f.progress(event)
	}
}

// foundImage is an image that was found.
type foundImage struct {
	imagebuild.Image
	// oci is the OCI image; nil for one of smolvm's own, which is own.
	oci *ocistore.Image
	own smolvm.Image
}

// config returns the configuration of an image.
func (f *finder) config(ctx context.Context, name string) (dockerfile.Config, error) {
	found, err := f.Find(ctx, name)
	if err != nil {
		return dockerfile.Config{}, err
	}
	return imagebuild.Config(found.Config)
}

// Find implements [imagebuild.Images].
func (f *finder) Find(ctx context.Context, name string) (imagebuild.Image, error) {
	if found, ok := f.found[name]; ok {
		return found.Image, nil
	}
	found, err := f.find(ctx, name)
	if err != nil {
		return imagebuild.Image{}, err
	}
	f.found[name] = found
	return found.Image, nil
}

func (f *finder) find(ctx context.Context, name string) (*foundImage, error) {
	catalog := f.builder.Catalog
	own, err := catalog.Bootable.Get(ctx, name)
	switch isBuiltIn := catalog.IsBuiltIn; {
	case name == smolvm.DefaultImage:
		own, err = f.base(ctx)
	case isBuiltIn != nil && isBuiltIn(name): // which hides a registry's, as in run
		own, err = f.builder.BuiltIn(ctx, name)
		if err != nil {
			return nil, err
		}
	}
	if err == nil && own.OCI == nil {
		return f.ownImage(ctx, name, own)
	}
	if err != nil && !errors.Is(err, smolvm.ErrImageNotFound) {
		return nil, err
	}
	oci, err := f.findOCI(ctx, name, own)
	if err != nil {
		return nil, err
	}
	config, err := catalog.OCI.Document(oci.Config)
	if err != nil {
		return nil, err
	}
	return &foundImage{Image: imagebuild.Image{Config: config, Layers: oci.Layers}, oci: &oci}, nil
}

// findOCI finds an OCI image: the one that a bootable image was made of, or the one of that name,
// which is pulled if it is missing.
func (f *finder) findOCI(ctx context.Context, name string, made smolvm.Image) (ocistore.Image, error) {
	if made.OCI != nil {
		oci, _, err := f.builder.Catalog.Origin(made)
		if errors.Is(err, smolvm.ErrImageNotFound) {
			err = fmt.Errorf("%q: its layers are not here any more", name)
		}
		return oci, err
	}
	ref, err := ociref.Parse(name)
	if err != nil {
		return ocistore.Image{}, err
	}
	if !f.pull {
		image, err := f.builder.Catalog.OCI.Get(ref)
		if !errors.Is(err, smolvm.ErrImageNotFound) {
			return image, err
		}
	}
	return f.pullImage(ctx, ref)
}

// base finds the default image, and builds it if it is missing.
func (f *finder) base(ctx context.Context) (smolvm.Image, error) {
	var done func(error)
	own, err := f.builder.Catalog.Base(ctx, func(smolvm.Progress) {
		if done == nil { // it was not there
			_, done = f.show("build " + smolvm.DefaultImage)
		}
	})
	if done != nil {
		done(err)
	}
	return own, err
}

// pullImage fetches an image from its registry.
func (f *finder) pullImage(ctx context.Context, ref ociref.Ref) (ocistore.Image, error) {
	event, done := f.show("pull " + ref.Familiar())
	var mu sync.Mutex // several layers come at once
	image, err := f.builder.Catalog.Fetch(ctx, ref, "", func(p ocistore.Progress) {
		if p.Done < p.Total {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		event := event
		event.Output = fmt.Appendf(nil, "layer %d of %d, %d bytes\n", p.Number, p.Layers, p.Total)
		f.progress(event)
	})
	done(err)
	return image, err
}

// ownImage has the files of an image of smolvm's own as a layer, which is made once.
func (f *finder) ownImage(ctx context.Context, name string, own smolvm.Image) (*foundImage, error) {
	store := f.builder.Catalog.OCI
	result, ok, err := store.Cached(rootKey(own))
	if err != nil || !ok {
		_, done := f.show("take the files of " + name)
		result, err = f.builder.takeRoot(ctx, own)
		done(err)
		if err != nil {
			return nil, fmt.Errorf("take the files of image %q: %w", name, err)
		}
	}
	config := fmt.Appendf(nil, `{"architecture":%q,"os":"linux","config":{},"history":[{"created":%q,"created_by":%q}],"rootfs":{"type":"layers"}}`,
		own.Arch, own.CreatedAt.UTC().Format(time.RFC3339), own.Source)
	return &foundImage{Image: imagebuild.Image{Config: config, Layers: []ocistore.Layer{result.Layer}}, own: own}, nil
}

// takeRoot stores the files of an image as a layer.
func (b *Builder) takeRoot(ctx context.Context, own smolvm.Image) (ocistore.CachedLayer, error) {
	result := ocistore.CachedLayer{CreatedAt: own.CreatedAt}
	write := func(ctx context.Context, w io.Writer) error { return b.Root(ctx, own, w) }
	err := stream.Feed(ctx, write, func(r io.Reader) (err error) {
		result.Layer, err = b.Catalog.OCI.AddLayer(ctx, r)
		return err
	})
	if err != nil {
		return ocistore.CachedLayer{}, err
	}
	return result, b.Catalog.OCI.SetCached(ctx, rootKey(own), result)
}
