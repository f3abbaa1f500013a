package ocistore

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

// What a step of a build has led to is kept until the store is pruned, and found only if it is
// there.
func TestCached(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	one, two := registry.push(t, imageOf(t, 1, 1000, 2000), "one"), registry.push(t, imageOf(t, 2, 3000), "two")
	image, err := pull(t, s, one)
	must(t, err)
	_, err = pull(t, s, two)
	must(t, err)
	key, empty, unknown := strings.Repeat("a", 64), strings.Repeat("b", 64), strings.Repeat("c", 64)
	want := CachedLayer{Layer: image.Layers[1], CreatedAt: time.Unix(5, 0).UTC()}
	must(t, s.SetCached(t.Context(), key, want), s.SetCached(t.Context(), empty, CachedLayer{CreatedAt: want.CreatedAt}))
	for _, ref := range []ociref.Ref{one, two} {
		must(t, s.Remove(t.Context(), ref))
	}
	if blobs := files(t, s, "blobs", algorithm); len(blobs) != 1 {
		t.Errorf("the store has %q", blobs)
	}
	got, ok, err := s.Cached(key)
	must(t, err)
	if diff := cmp.Diff(want, got); diff != "" || !ok {
		t.Error(ok, diff)
	}
	if got, ok, err := s.Cached(empty); err != nil || !ok || got.Layer != (Layer{}) {
		t.Errorf("what has changed nothing: %+v, %v, %v", got, ok, err)
	}
	if _, ok, err := s.Cached(unknown); err != nil || ok {
		t.Errorf("an unknown key: %v, %v", ok, err)
	}
	// Damaged records lead to nothing, and keep nothing.
	must(t, os.WriteFile(s.path(cacheDir, unknown), []byte("{"), 0o600))
	if _, ok, err := s.Cached(unknown); err == nil || ok {
		t.Errorf("a damaged record: %v, %v", ok, err)
	}
	for _, bad := range []string{"", "../x", key[1:]} {
		if _, _, err := s.Cached(bad); err == nil {
			t.Errorf("%q is taken for a key", bad)
		}
	}
	// Without its layer a record leads to nothing.
	must(t, s.Discard(want.Layer.Digest))
	if _, ok, err := s.Cached(key); err != nil || ok {
		t.Errorf("without its layer: %v, %v", ok, err)
	}
	_, err = s.Prune(t.Context())
	must(t, err)
	if _, ok, err := s.Cached(empty); err != nil || ok {
		t.Errorf("after pruning: %v, %v", ok, err)
	}
}
