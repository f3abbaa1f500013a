package ocistore

import (
	"context"
	"errors"
	"fmt"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

// PullOptions are the options of [Store.Pull].
type PullOptions struct {
	// Platform is what the image is to be for, such as linux/arm64. Empty: this host's guests.
	Platform string
	// Sources are where it is fetched from: the first of them that has it. Empty: from the
	// registry of its name.
	Sources []ociref.Ref
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
	sources := opts.Sources
	if len(sources) == 0 {
		sources = []ociref.Ref{ref}
	}
	var errs []error
	for _, source := range sources {
		image, err := s.pullFrom(ctx, source, opts.Access, want)
		if err == nil {
			image.Name, image.Pulled = ref.String(), true
			return image, s.name(ctx, image)
		}
		if len(sources) > 1 {
			err = fmt.Errorf("from %s: %w", source, err)
		}
		if errs = append(errs, err); ctx.Err() != nil {
			break
		}
	}
	return Image{}, errors.Join(errs...)
}

// pullFrom fetches an image from one place.
func (s *Store) pullFrom(ctx context.Context, ref ociref.Ref, access Access, want request) (Image, error) {
	from, err := newRemote(ctx, ref, access)
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
	return image, nil
}

// name has an image's name mean it.
func (s *Store) name(ctx context.Context, image Image) error {
	return s.writeName(ctx, nameRecord{Name: image.Name, Digest: image.Digest, Index: image.Index, AddedAt: image.AddedAt, Pulled: image.Pulled})
}
