package ocistore

import (
	"context"
	"fmt"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

// PullOptions are the options of [Store.Pull].
type PullOptions struct {
	// Platform is what the image is to be for, such as linux/arm64. Empty: this host's guests.
	Platform string
	// Access says how the registry is reached.
	Access Access
	// Progress is told how far each layer is, by several goroutines at once; it may be nil.
	Progress func(Progress)
}

// Pull fetches an image from its registry, and has the name mean it. Layers that are there are
// not fetched again, and one that was cut off goes on where it was. Of two that pull the same
// layer at once, in any processes, one fetches it and the other waits. The error matches
// [smolvm.ErrImageNotFound] if the registry has no such image.
func (s *Store) Pull(ctx context.Context, ref ociref.Ref, opts PullOptions) (Image, error) {
	image, err := s.pull(ctx, ref, opts)
	if err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	return image, nil
}

func (s *Store) pull(ctx context.Context, ref ociref.Ref, opts PullOptions) (Image, error) {
	want, err := newRequest(opts.Platform, opts.Progress)
	if err != nil {
		return Image{}, err
	}
	release, err := s.share(ctx)
	if err != nil {
		return Image{}, err
	}
	defer release()
	from, err := newRemote(ctx, ref, opts.Access)
	if err != nil {
		return Image{}, err
	}
	reference := ref.Tag
	if ref.Pinned() {
		reference = ref.Digest
	}
	text, err := from.manifest(ctx, reference)
	if err != nil {
		return Image{}, from.explain(err)
	}
	image, err := s.add(ctx, from, text, want)
	if err != nil {
		return Image{}, from.explain(err)
	}
	image.Name = ref.String()
	return image, s.name(ctx, image)
}

// name has an image's name mean it.
func (s *Store) name(ctx context.Context, image Image) error {
	return s.writeName(ctx, nameRecord{Name: image.Name, Digest: image.Digest, Index: image.Index, AddedAt: image.AddedAt})
}
