package ocistore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"github.com/smolvm/smolvm"
)

// parallelBlobs is how many blobs of an image are fetched at once.
const parallelBlobs = 3

// Progress is how far one layer is.
type Progress struct {
	// Layer is the layer's digest, and Number which one it is of Layers, counted from 1.
	Layer          string
	Number, Layers int
	// Done of Total are its bytes.
	Done, Total int64
}

// source is where the parts of images come from.
type source interface {
	// manifest returns a manifest or an index, checked.
	manifest(ctx context.Context, digest string) ([]byte, error)
	// blob has the store have a blob, and is told to report how many of its bytes there
	// are. Several are asked for at once.
	blob(ctx context.Context, s *Store, want v1.Descriptor, report func(done int64)) error
}

// request is what is wanted of a source.
type request struct {
	platform v1.Platform
	progress func(Progress) // never nil
}

// newRequest reads a platform such as linux/arm64/v8; empty is this host's guests'.
func newRequest(platform string, progress func(Progress)) (request, error) {
	if progress == nil {
		progress = func(Progress) {}
	}
	if platform == "" {
		platform = "linux/" + runtime.GOARCH
	}
	parsed, err := v1.ParsePlatform(platform)
	if err != nil || parsed.OS == "" || parsed.Architecture == "" {
		return request{}, fmt.Errorf("platform %q: give OS/ARCHITECTURE, such as linux/arm64", platform)
	}
	return request{platform: *parsed, progress: progress}, nil
}

// add stores an image, given its manifest or an index that leads to it. The store's lock is
// shared meanwhile.
func (s *Store) add(ctx context.Context, from source, text []byte, want request) (Image, error) {
	manifest, index, err := s.chooseManifest(ctx, from, text, want.platform)
	if err != nil {
		return Image{}, err
	}
	image, parts, err := s.parse(manifest)
	if err != nil {
		return Image{}, err
	}
	if err := s.makeRoom(parts); err != nil {
		return Image{}, err
	}
	// What the configuration says is checked before anything large is fetched.
	config, err := s.addConfig(ctx, from, parts[0])
	if err != nil {
		return Image{}, fmt.Errorf("configuration: %w", err)
	}
	if err := image.configure(config); err != nil {
		return Image{}, err
	}
	if err := image.checkPlatform(want.platform); err != nil {
		return Image{}, err
	}
	if err := s.addLayers(ctx, from, parts[1:], want.progress); err != nil {
		return Image{}, err
	}
	image.Index, image.AddedAt = index, time.Now().UTC()
	return image, s.putDocument(manifest)
}

// addConfig stores a configuration, again if what there is of it is damaged.
func (s *Store) addConfig(ctx context.Context, from source, want v1.Descriptor) ([]byte, error) {
	digest := want.Digest.String()
	if _, err := s.readDocument(digest); err != nil {
		if err := s.Discard(digest); err != nil {
			return nil, err
		}
	}
	if err := from.blob(ctx, s, want, func(int64) {}); err != nil {
		return nil, err
	}
	return s.readDocument(digest)
}

// makeRoom checks that there is room for what is not there yet.
func (s *Store) makeRoom(parts []v1.Descriptor) error {
	missing := int64(0)
	for _, part := range parts {
		if !s.has(part.Digest.Hex, part.Size) {
			missing += part.Size
		}
	}
	if s.limits.Room == nil || missing == 0 {
		return nil
	}
	return s.limits.Room(missing)
}

// addLayers stores layers, some of them at once. The first error ends the others.
func (s *Store) addLayers(ctx context.Context, from source, layers []v1.Descriptor, progress func(Progress)) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelBlobs)
	seen := map[v1.Hash]bool{} // an image may have the same layer twice
	for i, layer := range layers {
		if seen[layer.Digest] {
			continue
		}
		seen[layer.Digest] = true
		group.Go(func() error {
			report := func(done int64) {
				progress(Progress{Layer: layer.Digest.String(), Number: i + 1, Layers: len(layers), Done: done, Total: layer.Size})
			}
			report(0)
			if err := from.blob(ctx, s, layer, report); err != nil {
				return fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
			}
			report(layer.Size)
			return nil
		})
	}
	err := group.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) && context.Cause(ctx) != nil {
		err = context.Cause(ctx)
	}
	return err
}

// chooseManifest follows indexes to the manifest for a platform. It returns the digest of the
// first index too, if there is one.
func (s *Store) chooseManifest(ctx context.Context, from source, text []byte, platform v1.Platform) (manifest []byte, index string, err error) {
	for range maxIndexes {
		isIndex, err := isIndex(text)
		if err != nil {
			return nil, "", err
		}
		if !isIndex {
			return text, index, nil
		}
		if index == "" {
			index = digestOf(text)
		}
		list, err := v1.ParseIndexManifest(bytes.NewReader(text))
		if err != nil {
			return nil, "", fmt.Errorf("read index: %w", err)
		}
		chosen, err := choose(list.Manifests, platform)
		if err != nil {
			return nil, "", err
		}
		if text, err = from.manifest(ctx, chosen.Digest.String()); err != nil {
			return nil, "", fmt.Errorf("manifest for %s: %w", platform, err)
		}
	}
	return nil, "", errors.New("indexes lead to indexes, again and again")
}

// isIndex reports whether a document is an index rather than a manifest. Its fields decide, as
// the type that a server tells with it is not part of what has the digest.
func isIndex(text []byte) (bool, error) {
	var document struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(text, &document); err != nil {
		return false, fmt.Errorf("read manifest: %w", err)
	}
	switch isList := document.Manifests != nil; {
	case document.SchemaVersion == 1:
		return false, errors.New("the manifest has docker's old version 1, which has no digests of its layers: push the image again with a newer docker")
	case isList && (document.Config != nil || document.Layers != nil):
		return false, errors.New("the manifest is an index too")
	case isList != document.MediaType.IsIndex() && document.MediaType != "":
		return false, fmt.Errorf("the manifest says it is a %q, and it is not", document.MediaType)
	default:
		return isList, nil
	}
}

// choose returns the manifest for a platform: the first that fits best. One without a platform
// fits if it is the only one.
func choose(manifests []v1.Descriptor, platform v1.Platform) (v1.Descriptor, error) {
	var fits []v1.Descriptor
	var others []string
	for _, m := range manifests {
		switch {
		case m.Platform == nil && len(manifests) == 1:
			return m, nil
		case m.Platform == nil:
			continue
		case m.Platform.OS == platform.OS && m.Platform.Architecture == platform.Architecture && (platform.Variant == "" || m.Platform.Variant == platform.Variant):
			fits = append(fits, m)
		case m.Platform.OS != "unknown": // which attestations have
			others = append(others, m.Platform.String())
		}
	}
	// Of several variants the plain one runs everywhere, or else the first does as well as any.
	for _, m := range fits {
		if m.Platform.Variant == platform.Variant {
			return m, nil
		}
	}
	if len(fits) > 0 {
		return fits[0], nil
	}
	const shown = 12
	if len(others) > shown {
		others = append(others[:shown], "…")
	}
	return v1.Descriptor{}, noPlatform(platform, strings.Join(others, ", "))
}

func noPlatform(want v1.Platform, has string) error {
	return &smolvm.Error{Err: fmt.Errorf("%w: the image is not for %s; it is for: %q", smolvm.ErrUnsupported, want, has), Hint: "guests run programs of this host's architecture only; is there an image of the same program for it?"}
}

// checkPlatform checks that an image is for a platform. One that does not say is taken.
func (i *Image) checkPlatform(want v1.Platform) error {
	is := strings.Split(i.Platform, "/")
	if i.Platform == "" || is[0] == want.OS && (len(is) < 2 || is[1] == want.Architecture) {
		return nil
	}
	return noPlatform(want, i.Platform)
}
