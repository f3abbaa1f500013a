package manager_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/testenv"
)

// pushed pushes an image of one program, and nothing else, to a registry on loopback.
func pushed(t *testing.T, program string, content []byte) ociref.Ref {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: program, Mode: 0o755, Size: int64(len(content))})
	_, writeErr := w.Write(content)
	if err := errors.Join(err, writeErr, w.Close()); err != nil {
		t.Fatal(err)
	}
	scratch, err := mutate.AppendLayers(empty.Image, static.NewLayer(archive.Bytes(), types.DockerUncompressedLayer))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	ref, err := ociref.Parse(strings.TrimPrefix(server.URL, "http://") + "/scratch")
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(ref.String())
	if err == nil {
		err = remote.Write(tag, scratch, remote.WithContext(t.Context()))
	}
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// An image needs nothing but its program: no shell, no C library, no directory.
func TestImageFromRegistry(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	ref := pushed(t, "sayargs", testenv.Build(t, "github.com/smolvm/smolvm/internal/testenv/sayargs"))
	store, err := ocistore.Open(filepath.Join(t.TempDir(), "oci"), ocistore.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	pulled, err := store.Pull(t.Context(), ref, ocistore.PullOptions{Access: ocistore.Access{Keychain: authn.NewMultiKeychain()}})
	if err != nil {
		t.Fatal(err)
	}
	var layers []ocilayer.Layer
	for _, layer := range pulled.Layers {
		layers = append(layers, ocilayer.Layer{DiffID: layer.DiffID, Open: func() (io.ReadCloser, error) { return store.OpenLayer(layer) }})
	}
	rootfs := filepath.Join(t.TempDir(), "rootfs")
	if err := image.WriteLayers(t.Context(), rootfs, layers, image.LayerOptions{}); err != nil {
		t.Fatal(err)
	}
	built, err := m.BuildImage(t.Context(), smolvm.BuildOptions{Name: "scratch", Rootfs: rootfs})
	if err != nil {
		t.Fatal(err)
	}
	result, err := m.Run(t.Context(), smolvm.VMConfig{Image: built.Digest}, smolvm.Command{Args: []string{"/sayargs", "one", "two"}})
	if want := `0:0 ["/sayargs" "one" "two"]` + "\n"; err != nil || string(result.Stdout) != want {
		t.Errorf("it says %q (%v), want %q", result.Stdout, err, want)
	}
	if err := m.RemoveImage(t.Context(), built.Digest); err != nil {
		t.Error(err)
	}
}
