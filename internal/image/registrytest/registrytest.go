// Package registrytest runs registries of images on loopback for tests, and pushes images to them.
package registrytest

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log"
	"maps"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Registry is a registry that holds nothing but what is pushed to it. It ends with the test.
type Registry struct {
	// Host is its address and port, with which the names of its images begin.
	Host string

	server *httptest.Server
}

// New starts a registry.
func New(t testing.TB) *Registry {
	t.Helper()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	return &Registry{Host: strings.TrimPrefix(server.URL, "http://"), server: server}
}

// Close ends it before the test does.
func (r *Registry) Close() { r.server.Close() }

// Archive returns the archive of a layer with those files, which are root's and executable, in the
// order of their names.
func Archive(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, file := range slices.Sorted(maps.Keys(files)) {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: file, Mode: 0o755, Size: int64(len(files[file]))})
		_, writeErr := io.WriteString(w, files[file])
		if err := errors.Join(err, writeErr); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return archive.Bytes()
}

// Push pushes an image of one layer with those files, under a name that has the registry's host.
func Push(t testing.TB, ref string, files map[string]string, config v1.Config) {
	t.Helper()
	made, err := mutate.AppendLayers(empty.Image, static.NewLayer(Archive(t, files), types.DockerUncompressedLayer))
	if err == nil {
		made, err = mutate.Config(made, config)
	}
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(ref)
	if err == nil {
		err = remote.Write(tag, made, remote.WithContext(t.Context()))
	}
	if err != nil {
		t.Fatal(err)
	}
}
