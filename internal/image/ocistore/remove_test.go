package ocistore

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
)

func TestRemove(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	small := imageOf(t, 1, 1000)
	large, err := mutate.AppendLayers(small, layerOf(t, 9, 2000))
	must(t, err)
	one, two := registry.push(t, small, "one"), registry.push(t, large, "two")
	image, err := pull(t, s, one)
	must(t, err)
	_, err = pull(t, s, two)
	must(t, err)
	three, err := ociref.Parse("three")
	must(t, err)
	must(t, s.Tag(t.Context(), image, three))
	// What another name leads to stays.
	must(t, s.Remove(t.Context(), one))
	if _, err := s.Get(one); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("a removed name: %v", err)
	}
	found, err := s.Get(three)
	must(t, err)
	checkWhole(t, s, found, small)
	must(t, s.Remove(t.Context(), three))
	found, err = s.Get(two)
	must(t, err)
	checkWhole(t, s, found, large)
	if blobs := files(t, s, "blobs", algorithm); len(blobs) != 4 { // manifest, configuration, two layers
		t.Errorf("the store has %q", blobs)
	}
	if err := s.Remove(t.Context(), one); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	must(t, s.Remove(t.Context(), two))
	if blobs := files(t, s, "blobs", algorithm); len(blobs) > 0 {
		t.Errorf("the store has %q", blobs)
	}
}

// While somebody reads an image, its layers stay; a later call removes them.
func TestRemoveHeld(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	want := imageOf(t, 1, 1000)
	ref := registry.push(t, want, "one")
	image, err := pull(t, s, ref)
	must(t, err)
	release, err := s.Hold(t.Context())
	must(t, err)
	must(t, s.Remove(t.Context(), ref))
	checkWhole(t, s, image, want)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Prune(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("pruned while an image is read: %v", err)
	}
	release()
	must(t, os.WriteFile(s.path(partialDir, "x"), make([]byte, 10), 0o600), os.MkdirAll(s.path(spoolDir, "import-1"), 0o700),
		os.WriteFile(s.path(namesDir, ".new-1"), nil, 0o600))
	removed, err := s.Prune(t.Context())
	must(t, err)
	if removed < 1000 {
		t.Errorf("%d bytes are removed", removed)
	}
	for _, dir := range [][]string{{"blobs", algorithm}, {partialDir}, {spoolDir}, {namesDir}} {
		if left := files(t, s, dir...); len(left) > 0 {
			t.Errorf("%q has %q", dir, left)
		}
	}
	if _, err := openStore(t, Limits{}).Prune(t.Context()); err != nil {
		t.Errorf("prune without a store: %v", err)
	}
}

// A damaged image hides no other, and nothing is removed while it is not known what is needed.
func TestDamaged(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	one, two := registry.push(t, imageOf(t, 1, 1000), "one"), registry.push(t, imageOf(t, 5, 1000), "two")
	image, err := pull(t, s, one)
	must(t, err)
	_, err = pull(t, s, two)
	must(t, err)
	digits, err := hexOf(image.Digest)
	must(t, err)
	must(t, os.WriteFile(s.blobPath(digits), []byte("damaged"), 0o600))
	var wrong *DigestError
	if _, err := s.Get(one); !errors.As(err, &wrong) {
		t.Errorf("a damaged manifest: %v", err)
	}
	list, err := s.List()
	must(t, err)
	if len(list) != 2 || list[0].Platform == list[1].Platform {
		t.Errorf("list is %+v", list)
	}
	if _, err := s.Prune(t.Context()); err == nil {
		t.Error("pruned though a manifest can't be read")
	}
	// To pull it again repairs it, and a configuration of the same length.
	digits, err = hexOf(image.Config)
	must(t, err)
	info, err := os.Stat(s.blobPath(digits))
	must(t, err, os.WriteFile(s.blobPath(digits), make([]byte, info.Size()), 0o600))
	_, err = pull(t, s, one)
	must(t, err)
	_, err = s.Get(one)
	must(t, err)
	_, err = s.Prune(t.Context())
	must(t, err)
}
