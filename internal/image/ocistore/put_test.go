package ocistore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

// archiveOf returns the archive of [layerOf], unpacked.
func archiveOf(t testing.TB, size int) []byte {
	t.Helper()
	r, err := layerOf(t, 1, size).Uncompressed()
	must(t, err)
	text, err := io.ReadAll(r)
	must(t, err)
	return text
}

// What is made here is an image like any other: its parts are what their digests say.
func TestAddImage(t *testing.T) {
	s := openStore(t, Limits{})
	ctx := t.Context()
	release, err := s.Hold(ctx)
	must(t, err)
	archive := archiveOf(t, 100_000)
	layer, err := s.AddLayer(ctx, bytes.NewReader(archive))
	must(t, err)
	if layer.DiffID != digestOf(archive) {
		t.Errorf("the layer is %s, not %s", layer.DiffID, digestOf(archive))
	}
	if again, err := s.AddLayer(ctx, bytes.NewReader(archive)); err != nil || again != layer {
		t.Errorf("added again it is %+v, %v", again, err)
	}
	file, err := s.OpenLayer(layer)
	must(t, err)
	defer func() { _ = file.Close() }()
	stored, err := io.ReadAll(file)
	must(t, err)
	if digestOf(stored) != layer.Digest || int64(len(stored)) != layer.Size {
		t.Errorf("%d bytes are stored with the digest %s", len(stored), digestOf(stored))
	}
	decoder, err := zstd.NewReader(nil)
	must(t, err)
	defer decoder.Close()
	if unpacked, err := decoder.DecodeAll(stored, nil); err != nil || !bytes.Equal(unpacked, archive) {
		t.Errorf("%d bytes are unpacked, %v", len(unpacked), err)
	}

	ref, err := ociref.Parse("made:1")
	must(t, err)
	added, err := s.AddImage(ctx, ref, []byte(`{"config":{"Cmd":["sh"]},"x-own":[1]}`), []Layer{layer})
	must(t, err)
	found, err := s.Get(ref)
	must(t, err)
	if found.Digest != added.Digest || !slices.Equal(found.Layers, []Layer{layer}) || found.Platform != "linux/"+runtime.GOARCH {
		t.Errorf("found %+v, added %+v", found, added)
	}
	text, err := s.Document(found.Config)
	must(t, err)
	var config struct {
		Config struct{ Cmd []string }
		Own    []int `json:"x-own"`
	}
	if err := json.Unmarshal(text, &config); err != nil || !slices.Equal(config.Config.Cmd, []string{"sh"}) || len(config.Own) != 1 {
		t.Errorf("the configuration is %s", text)
	}
	release()
	if _, err := s.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := s.OpenLayer(layer); err != nil {
		t.Errorf("a layer of a named image was removed: %v", err)
	}
}

func TestAddWhatIsWrong(t *testing.T) {
	s := openStore(t, Limits{Image: 50_000})
	full := errors.New("full")
	small := openStore(t, Limits{Room: func(int64) error { return full }})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	broken := errors.New("broken")
	for name, test := range map[string]struct {
		store *Store
		ctx   context.Context
		from  io.Reader
		want  error
	}{
		"too long":                       {s, t.Context(), bytes.NewReader(archiveOf(t, 60_000)), nil},
		"too long, though it packs well": {s, t.Context(), strings.NewReader(strings.Repeat("a", 60_000)), nil},
		"no room":                        {small, t.Context(), bytes.NewReader(archiveOf(t, 60_000)), full},
		"cut off":                        {s, t.Context(), iotest.ErrReader(broken), broken},
		"cancelled":                      {s, ctx, bytes.NewReader(archiveOf(t, 100)), context.Canceled},
	} {
		_, err := test.store.AddLayer(test.ctx, test.from)
		if err == nil || test.want != nil && !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
		if left, err := os.ReadDir(test.store.path(spoolDir)); err == nil && len(left) > 0 {
			t.Errorf("%s: %d files are left", name, len(left))
		}
	}
	ref, err := ociref.Parse("made")
	must(t, err)
	missing := Layer{Digest: digestOf([]byte("x")), DiffID: digestOf([]byte("y")), MediaType: "application/vnd.oci.image.layer.v1.tar+zstd", Size: 1}
	for config, layers := range map[string][]Layer{"{}": {missing}, "null": nil, "[]": nil, "{": nil} {
		if _, err := s.AddImage(t.Context(), ref, []byte(config), layers); err == nil {
			t.Errorf("%s with %d layers is an image", config, len(layers))
		}
	}
}
