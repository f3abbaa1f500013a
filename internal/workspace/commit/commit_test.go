package commit

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/layertar"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

// guest is a guest that has what it writes.
type guest func(ctx context.Context, list io.Reader, w io.Writer) error

func (g guest) Root(ctx context.Context, list io.Reader, w io.Writer, _ wire.RootRequest) error {
	return g(ctx, list, w)
}

// archiveOf returns an archive with an empty file.
func archiveOf(t *testing.T, name string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name}), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func openStore(t *testing.T, limits ocistore.Limits) *ocistore.Store {
	t.Helper()
	store, err := ocistore.Open(t.TempDir(), limits)
	if err != nil {
		t.Fatal(err)
	}
	return store
}

var now = time.Unix(1_700_000_000, 0).UTC()

func options(t *testing.T, name string) Options {
	t.Helper()
	ref, err := ociref.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	return Options{Name: ref, Arch: "amd64", Now: now, Author: "me", Message: "why"}
}

// An image has the layers of the one below, and its configuration with the changes.
func TestImage(t *testing.T) {
	store := openStore(t, ocistore.Limits{})
	whole := guest(func(_ context.Context, list io.Reader, w io.Writer) error {
		base, err := layertar.ReadBase(list)
		if base != nil || err != nil {
			t.Errorf("of an image without layers it is told of %v, %v", base, err)
		}
		_, err = w.Write(archiveOf(t, "one"))
		return err
	})
	first := options(t, "app:1")
	first.Config = &smolvm.ImageConfig{Cmd: []string{"sh"}, ExposedPorts: []string{"80/tcp"}, Healthcheck: &smolvm.Healthcheck{Command: []string{"true"}, Shell: true, Retries: 2}}
	below, err := Image(t.Context(), whole, store, first)
	if err != nil {
		t.Fatal(err)
	}
	differs := guest(func(_ context.Context, list io.Reader, w io.Writer) error {
		text, err := io.ReadAll(list)
		if !bytes.HasPrefix(text, []byte("one\x00")) {
			t.Errorf("it is told of %q, %v", text, err)
		}
		_, err = w.Write(archiveOf(t, "two"))
		return err
	})
	second := options(t, "app:2")
	second.Base = &below
	second.Layers = []ocilayer.Layer{{DiffID: below.Layers[0].DiffID, Open: func() (io.ReadCloser, error) { return store.OpenLayer(below.Layers[0]) }}}
	second.Change = func(_ context.Context, config *Config) error {
		config.Config.Env = []string{"A=1"}
		return nil
	}
	made, err := Image(t.Context(), differs, store, second)
	if err != nil {
		t.Fatal(err)
	}
	if len(made.Layers) != 2 || made.Layers[0] != below.Layers[0] {
		t.Errorf("its layers are %+v", made.Layers)
	}
	document, err := store.Document(made.Config)
	var config Config
	if err := errors.Join(err, json.Unmarshal(document, &config)); err != nil {
		t.Fatal(err)
	}
	inner := config.Config
	if !slices.Equal(inner.Cmd, []string{"sh"}) || !slices.Equal(inner.Env, []string{"A=1"}) || len(inner.ExposedPorts) != 1 ||
		inner.Healthcheck == nil || inner.Healthcheck.Test[0] != "CMD-SHELL" || config.Author != "me" || !config.Created.Equal(now) {
		t.Errorf("its configuration is %s", document)
	}
	if len(config.History) != 2 || config.History[1].Comment != "why" || len(config.RootFS.DiffIDs) != 2 {
		t.Errorf("its history is %+v", config.History)
	}
}

// What fails on either side ends the other one, and no image is named.
func TestImageFails(t *testing.T) {
	broken := errors.New("broken")
	endless := guest(func(ctx context.Context, _ io.Reader, w io.Writer) error {
		for ctx.Err() == nil {
			if _, err := w.Write(archiveOf(t, "x")[:512]); err != nil {
				return err
			}
		}
		return context.Cause(ctx)
	})
	for name, test := range map[string]struct {
		guest  guest
		limits ocistore.Limits
		change func(*Options)
		want   error
	}{
		"guest":  {guest(func(context.Context, io.Reader, io.Writer) error { return broken }), ocistore.Limits{}, nil, broken},
		"room":   {endless, ocistore.Limits{Room: func(int64) error { return broken }}, nil, broken},
		"change": {endless, ocistore.Limits{}, func(o *Options) { o.Change = func(context.Context, *Config) error { return broken } }, broken},
		"base": {guest(func(_ context.Context, list io.Reader, _ io.Writer) error {
			_, err := io.Copy(io.Discard, list)
			return err
		}), ocistore.Limits{}, func(o *Options) {
			o.Layers = []ocilayer.Layer{{Open: func() (io.ReadCloser, error) { return nil, broken }}}
		}, broken},
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t, test.limits)
			opts := options(t, "app")
			if name == "base" {
				whole := guest(func(_ context.Context, _ io.Reader, w io.Writer) error {
					_, err := w.Write(archiveOf(t, "one"))
					return err
				})
				below, err := Image(t.Context(), whole, store, options(t, "below"))
				if err != nil {
					t.Fatal(err)
				}
				opts.Base = &below
			}
			if test.change != nil {
				test.change(&opts)
			}
			if _, err := Image(t.Context(), test.guest, store, opts); !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if _, err := store.Get(opts.Name); !errors.Is(err, smolvm.ErrImageNotFound) {
				t.Errorf("there is an image: %v", err)
			}
		})
	}
}
