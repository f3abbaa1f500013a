package ocistore

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ggcrpartial "github.com/google/go-containerregistry/pkg/v1/partial"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

// PushOptions are the options of [Store.Push].
type PushOptions struct {
	// Access says how the registry is reached.
	Access Access
	// Progress is told how far each layer is, by several goroutines at once; it may be nil.
	Progress func(Progress)
}

// Push sends an image to the registry of a name, which then means it there. Layers that the
// registry has are not sent. The registry is reached by go-containerregistry, which sends again
// what has failed.
func (s *Store) Push(ctx context.Context, image Image, ref ociref.Ref, opts PushOptions) error {
	if err := s.push(ctx, image, ref, opts); err != nil {
		return fmt.Errorf("push %s: %w", ref, (&remote{ref: ref}).explain(causeOf(ctx, err)))
	}
	return nil
}

func (s *Store) push(ctx context.Context, image Image, ref ociref.Ref, opts PushOptions) error {
	if ref.Pinned() {
		return errors.New("the digest follows from what is pushed: give a tag")
	}
	release, err := s.share(ctx)
	if err != nil {
		return err
	}
	defer release()
	stored, err := ggcrpartial.CompressedToImage(storedImage{s, image, opts.Progress})
	if err != nil {
		return err
	}
	server, err := ref.Server()
	if err != nil {
		return err
	}
	base := opts.Access.Transport
	if base == nil {
		base = newTransport()
	}
	var keychain authn.Keychain = authn.DefaultKeychain
	if opts.Access.Keychain != nil {
		keychain = opts.Access.Keychain
	}
	return ggcr.Write(server.Repo(ref.Repository).Tag(ref.Tag), stored,
		ggcr.WithContext(ctx), ggcr.WithAuthFromKeychain(keychain), ggcr.WithJobs(parallelBlobs),
		ggcr.WithTransport(guard{base, isLoopback(ref.Registry)}))
}

// storedImage is an image of a store as go-containerregistry has images.
type storedImage struct {
	store    *Store
	image    Image
	progress func(Progress) // nil: nobody is told
}

// RawManifest implements [ggcrpartial.CompressedImageCore].
func (i storedImage) RawManifest() ([]byte, error) { return i.store.readDocument(i.image.Digest) }

// RawConfigFile implements [ggcrpartial.CompressedImageCore].
func (i storedImage) RawConfigFile() ([]byte, error) { return i.store.readDocument(i.image.Config) }

// MediaType implements [ggcrpartial.CompressedImageCore].
func (i storedImage) MediaType() (types.MediaType, error) {
	manifest, err := ggcrpartial.Manifest(i)
	if err != nil || manifest.MediaType == "" {
		return types.OCIManifestSchema1, err
	}
	return manifest.MediaType, nil
}

// LayerByDigest implements [ggcrpartial.CompressedImageCore].
func (i storedImage) LayerByDigest(hash v1.Hash) (ggcrpartial.CompressedLayer, error) {
	for n, layer := range i.image.Layers {
		if layer.Digest != hash.String() {
			continue
		}
		report := func(int64) {}
		if i.progress != nil {
			report = func(done int64) {
				i.progress(Progress{Layer: layer.Digest, Number: n + 1, Layers: len(i.image.Layers), Done: done, Total: layer.Size})
			}
		}
		return storedLayer{i.store, layer, report}, nil
	}
	return nil, fmt.Errorf("layer %s: the image has none of that digest", hash)
}

// storedLayer is a layer of a store as go-containerregistry has layers.
type storedLayer struct {
	store  *Store
	layer  Layer
	report func(done int64)
}

// Digest implements [ggcrpartial.CompressedLayer].
func (l storedLayer) Digest() (v1.Hash, error) { return v1.NewHash(l.layer.Digest) }

// Compressed implements [ggcrpartial.CompressedLayer].
func (l storedLayer) Compressed() (io.ReadCloser, error) {
	file, err := l.store.OpenLayer(l.layer)
	if err != nil {
		return nil, err
	}
	return reporter{file, l.report, new(int64)}, nil
}

// Size implements [ggcrpartial.CompressedLayer].
func (l storedLayer) Size() (int64, error) { return l.layer.Size, nil }

// MediaType implements [ggcrpartial.CompressedLayer].
func (l storedLayer) MediaType() (types.MediaType, error) {
	return types.MediaType(l.layer.MediaType), nil
}
