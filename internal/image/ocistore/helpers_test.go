package ocistore

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func openStore(t testing.TB, limits Limits) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "oci"), limits)
	must(t, err)
	return s
}

// layerOf returns a layer of one file, of so many bytes that can't be packed well.
func layerOf(t testing.TB, seed uint64, size int) v1.Layer {
	t.Helper()
	content := make([]byte, size)
	random := rand.New(rand.NewPCG(seed, 0))
	for i := range content {
		content[i] = byte(random.Uint32())
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("file%d", seed), Size: int64(size), Mode: 0o644}))
	_, err := w.Write(content)
	must(t, err, w.Close())
	return static.NewLayer(archive.Bytes(), types.OCIUncompressedLayer)
}

// imageOf returns an image of layers of those sizes, for this host's architecture.
func imageOf(t testing.TB, seed uint64, sizes ...int) v1.Image {
	t.Helper()
	return imageFor(t, "linux", runtime.GOARCH, seed, sizes...)
}

func imageFor(t testing.TB, system, arch string, seed uint64, sizes ...int) v1.Image {
	t.Helper()
	image := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	for i, size := range sizes {
		var err error
		image, err = mutate.AppendLayers(image, layerOf(t, seed+uint64(i), size))
		must(t, err)
	}
	config, err := image.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.OS, config.Architecture = system, arch
	image, err = mutate.ConfigFile(image, config)
	must(t, err)
	return image
}

// server is a registry on loopback that can be told to misbehave.
type server struct {
	*httptest.Server

	mu       sync.Mutex
	requests []string // "GET /v2/… bytes=5-"
	// misbehave answers a request in place of the registry, if it returns true.
	misbehave func(w http.ResponseWriter, r *http.Request, count int) bool
	counts    map[string]int // of requests for a path
}

func newServer(t testing.TB) *server {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := &server{counts: map[string]int{}}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")))
		s.counts[r.URL.Path]++
		count, misbehave := s.counts[r.URL.Path], s.misbehave
		s.mu.Unlock()
		if misbehave != nil && misbehave(w, r, count) {
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

// does has the registry misbehave, or no more if it is nil. It returns what it did before.
func (s *server) does(misbehave func(w http.ResponseWriter, r *http.Request, count int) bool) (before func(w http.ResponseWriter, r *http.Request, count int) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before, s.misbehave = s.misbehave, misbehave
	return before
}

// asked returns the requests so far that have a text in them, and forgets all.
func (s *server) asked(text string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []string
	for _, request := range s.requests {
		if strings.Contains(request, text) {
			found = append(found, request)
		}
	}
	s.requests, s.counts = nil, map[string]int{}
	return found
}

func (s *server) host() string { return strings.TrimPrefix(s.URL, "http://") }

// push pushes an image or an index.
func (s *server) push(t testing.TB, what ggcr.Taggable, text string) ociref.Ref {
	t.Helper()
	before := s.does(nil)
	defer func() {
		s.does(before)
		s.asked("")
	}()
	ref, err := ociref.Parse(s.host() + "/" + text)
	must(t, err)
	parsed, err := name.ParseReference(ref.String())
	must(t, err)
	switch pushed := what.(type) {
	case v1.Image:
		must(t, ggcr.Write(parsed, pushed))
	case v1.ImageIndex:
		must(t, ggcr.WriteIndex(parsed, pushed))
	default:
		must(t, ggcr.Tag(parsed.(name.Tag), what))
	}
	return ref
}

// quick is how tests reach a registry: without credentials, and without waits.
func quick() Access {
	return Access{Keychain: authn.NewMultiKeychain(), Backoff: func(ctx context.Context, _ time.Duration) error { return context.Cause(ctx) }}
}

func pull(t testing.TB, s *Store, ref ociref.Ref) (Image, error) {
	t.Helper()
	return s.Pull(t.Context(), ref, PullOptions{Access: quick()})
}

// checkWhole fails unless a store has an image whole.
func checkWhole(t testing.TB, s *Store, image Image, want v1.Image) {
	t.Helper()
	digest, err := want.Digest()
	must(t, err)
	if image.Digest != digest.String() {
		t.Errorf("the image is %s, want %s", image.Digest, digest)
	}
	layers, err := want.Layers()
	must(t, err)
	if len(layers) != len(image.Layers) {
		t.Fatalf("the image has %d layers, want %d", len(image.Layers), len(layers))
	}
	for i, layer := range layers {
		from, err := layer.Compressed()
		must(t, err)
		wanted, err := io.ReadAll(from)
		must(t, err)
		file, err := s.OpenLayer(image.Layers[i])
		must(t, err)
		got, err := io.ReadAll(file)
		must(t, err, file.Close())
		if !bytes.Equal(got, wanted) {
			t.Errorf("layer %d has other content", i)
		}
		id, err := layer.DiffID()
		must(t, err)
		if image.Layers[i].DiffID != id.String() {
			t.Errorf("layer %d is %s, want %s", i, image.Layers[i].DiffID, id)
		}
	}
}

// blobs lists the files in a directory of a store.
func files(t testing.TB, s *Store, parts ...string) []string {
	t.Helper()
	entries, err := os.ReadDir(s.path(parts...))
	if err != nil {
		return nil
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}
