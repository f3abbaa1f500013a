package ocistore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

// made returns an image of two layers that is in a store.
func made(t testing.TB, s *Store) Image {
	t.Helper()
	ref, err := ociref.Parse("made:1")
	must(t, err)
	var layers []Layer
	for _, size := range []int{1000, 70_000} {
		layer, err := s.AddLayer(t.Context(), bytes.NewReader(archiveOf(t, size)))
		must(t, err)
		layers = append(layers, layer)
	}
	image, err := s.AddImage(t.Context(), ref, []byte(`{"history":[{"created_by":"RUN a"},{"created_by":"ENV b","empty_layer":true}]}`), layers)
	must(t, err)
	return image
}

// What is exported is read by others, and here it is the same image again.
func TestExport(t *testing.T) {
	s := openStore(t, Limits{})
	image := made(t, s)
	var archive, again bytes.Buffer
	must(t, s.Export(t.Context(), image, &archive), s.Export(t.Context(), image, &again))
	if !bytes.Equal(archive.Bytes(), again.Bytes()) {
		t.Error("exported again it is another archive")
	}
	path := filepath.Join(t.TempDir(), "image.tar")
	must(t, os.WriteFile(path, archive.Bytes(), 0o600))
	tag, err := name.NewTag("made:1")
	must(t, err)
	docker, err := tarball.ImageFromPath(path, &tag)
	must(t, err)
	if layers, err := docker.Layers(); err != nil || len(layers) != 2 {
		t.Errorf("as docker reads it, it has %d layers, %v", len(layers), err)
	}

	dir := filepath.Join(t.TempDir(), "layout")
	must(t, s.ExportDir(t.Context(), image, dir))
	index, err := layout.ImageIndexFromPath(dir)
	must(t, err)
	if manifest, err := index.IndexManifest(); err != nil || len(manifest.Manifests) != 1 || manifest.Manifests[0].Digest.String() != image.Digest {
		t.Errorf("as others read the layout, it has %+v, %v", manifest, err)
	}
	if err := s.ExportDir(t.Context(), image, dir); !errors.Is(err, os.ErrExist) {
		t.Errorf("over what is there: %v", err)
	}
	for form, read := range map[string]func(*Store) ([]Image, error){
		"archive": func(to *Store) ([]Image, error) { return to.Import(t.Context(), &archive, ImportOptions{}) },
		"layout":  func(to *Store) ([]Image, error) { return to.ImportDir(t.Context(), dir, ImportOptions{}) },
	} {
		images, err := read(openStore(t, Limits{}))
		if err != nil || len(images) != 1 || images[0].Digest != image.Digest || images[0].Name != image.Name {
			t.Errorf("%s: imported %+v, %v", form, images, err)
		}
	}
	full := errors.New("full")
	if err := s.Export(t.Context(), image, failing{full}); !errors.Is(err, full) {
		t.Errorf("to what fails: %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Export(cancelled, image, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestHistory(t *testing.T) {
	s := openStore(t, Limits{})
	image := made(t, s)
	steps, err := s.History(image)
	must(t, err)
	var texts []string
	for _, step := range steps {
		text := step.CreatedBy
		if step.Layer != nil {
			text += " " + step.Layer.DiffID
		}
		texts = append(texts, text)
	}
	if want := []string{"RUN a " + image.Layers[0].DiffID, "ENV b", " " + image.Layers[1].DiffID}; !slices.Equal(texts, want) {
		t.Errorf("steps are %q, want %q", texts, want)
	}
}

// What is pushed is there, and can be pulled.
func TestPush(t *testing.T) {
	s, at := openStore(t, Limits{}), newServer(t)
	host := strings.TrimPrefix(at.URL, "http://")
	image := made(t, s)
	ref, err := ociref.Parse(host + "/pushed:2")
	must(t, err)
	access := Access{Keychain: authn.NewMultiKeychain()}
	var told []Progress
	report := make(chan Progress, 1000)
	must(t, s.Push(t.Context(), image, ref, PushOptions{Access: access, Progress: func(p Progress) { report <- p }}))
	close(report)
	for p := range report {
		told = append(told, p)
	}
	if !slices.ContainsFunc(told, func(p Progress) bool { return p.Number == 2 && p.Layers == 2 && p.Done == p.Total }) {
		t.Errorf("told: %+v", told)
	}
	tag, err := name.NewTag(ref.String())
	must(t, err)
	there, err := ggcr.Image(tag)
	must(t, err)
	if digest, err := there.Digest(); err != nil || digest.String() != image.Digest {
		t.Errorf("there it is %s, %v", digest, err)
	}
	pulled, err := openStore(t, Limits{}).Pull(t.Context(), ref, PullOptions{Access: access})
	if err != nil || pulled.Digest != image.Digest {
		t.Errorf("pulled it is %s, %v", pulled.Digest, err)
	}
	if err := s.Push(t.Context(), image, ref.Pin(image.Digest), PushOptions{Access: access}); err == nil {
		t.Error("a digest was pushed to")
	}
	at.Close()
	if err := s.Push(t.Context(), image, ref, PushOptions{Access: access}); err == nil {
		t.Error("it was pushed to nowhere")
	}
}
