package ocistore

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
)

// member is a file of an archive.
type member struct {
	name, content, link string
	kind                byte
}

func archive(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		kind := m.kind
		if kind == 0 {
			kind = tar.TypeReg
		}
		must(t, w.WriteHeader(&tar.Header{Typeflag: kind, Name: m.name, Linkname: m.link, Size: int64(len(m.content)), Mode: 0o644}))
		_, err := io.WriteString(w, m.content)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// parts returns the text of an image's configuration, and of its layers as archives.
func parts(t testing.TB, image v1.Image) (config string, layers []string) {
	t.Helper()
	text, err := image.RawConfigFile()
	must(t, err)
	list, err := image.Layers()
	must(t, err)
	for _, layer := range list {
		r, err := layer.Uncompressed()
		must(t, err)
		content, err := io.ReadAll(r)
		must(t, err)
		layers = append(layers, string(content))
	}
	return string(text), layers
}

// checkLayers fails unless an image has those layers, whatever its manifest is.
func checkLayers(t testing.TB, s *Store, image Image, want []string) {
	t.Helper()
	if len(image.Layers) != len(want) {
		t.Fatalf("there are %d layers, want %d", len(image.Layers), len(want))
	}
	for i, layer := range image.Layers {
		file, err := s.OpenLayer(layer)
		must(t, err)
		got, err := io.ReadAll(file)
		must(t, err, file.Close())
		if string(got) != want[i] {
			t.Errorf("layer %d has other content", i)
		}
	}
}

func TestImportDocker(t *testing.T) {
	image := imageOf(t, 1, 100_000, 5000)
	config, layers := parts(t, image)
	written := func() []byte { // as ggcr writes it, which packs layers
		var b bytes.Buffer
		tag, err := name.NewTag("some/image:v1")
		must(t, err)
		must(t, tarball.Write(tag, image, &b))
		return b.Bytes()
	}()
	manifest := `[{"Config":"abc.json","RepoTags":["some/image:v1","ghcr.io/a/b:2"],"Layers":["one/layer.tar","two/layer.tar"]}]`
	packed := func(content []byte) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := w.Write(content)
		must(t, err, w.Close())
		return b.Bytes()
	}
	old := archive(t, member{name: "one/layer.tar", content: layers[0]}, member{name: "two/", kind: tar.TypeDir}, member{name: "two/layer.tar", content: layers[1]},
		member{name: "abc.json", content: config}, member{name: "manifest.json", content: manifest})
	for _, test := range []struct {
		name    string
		archive []byte
		names   int
		unsure  bool // the layers are packed
	}{
		{"as ggcr writes it", written, 1, true},
		{"as docker wrote it", old, 2, false},
		{"packed", packed(old), 2, false},
		{"manifest first, names with dots", archive(t, member{name: "./manifest.json", content: manifest}, member{name: "./abc.json", content: config},
			member{name: "./one/layer.tar", content: layers[0]}, member{name: "two/./layer.tar", content: layers[1]}), 2, false},
		{"links between layers", archive(t, member{name: "manifest.json", content: manifest}, member{name: "abc.json", content: config},
			member{name: "x/layer.tar", content: layers[0]}, member{name: "one/layer.tar", kind: tar.TypeSymlink, link: "../x/layer.tar"},
			member{name: "y", content: layers[1]}, member{name: "two/layer.tar", kind: tar.TypeLink, link: "y"}), 2, false},
		{"a file twice", archive(t, member{name: "abc.json", content: "{}"}, member{name: "manifest.json", content: manifest}, member{name: "abc.json", content: config},
			member{name: "one/layer.tar", content: layers[0]}, member{name: "two/layer.tar", content: layers[1]}), 2, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := openStore(t, Limits{})
			images, err := s.Import(t.Context(), bytes.NewReader(test.archive), ImportOptions{})
			must(t, err)
			if len(images) != test.names || images[0].Name != "docker.io/some/image:v1" {
				t.Fatalf("imported %+v", images)
			}
			if !test.unsure {
				checkLayers(t, s, images[0], layers)
			}
			ref, err := ociref.Parse(images[test.names-1].Name)
			must(t, err)
			found, err := s.Get(ref)
			must(t, err)
			if found.Digest != images[0].Digest || found.Platform != images[0].Platform {
				t.Errorf("found %+v", found)
			}
			if left := files(t, s, spoolDir); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			// Again, under another name.
			other, err := ociref.Parse("other")
			must(t, err)
			again, err := s.Import(t.Context(), bytes.NewReader(test.archive), ImportOptions{Name: other})
			must(t, err)
			if len(again) != 1 || again[0].Digest != images[0].Digest || again[0].Name != other.String() {
				t.Errorf("imported again: %+v", again)
			}
		})
	}
}

func TestImportRefuses(t *testing.T) {
	config, layers := parts(t, imageOf(t, 1, 1000))
	manifest := func(config, layer string) member {
		text, err := json.Marshal([]dockerImage{{Config: config, RepoTags: []string{"x"}, Layers: []string{layer}}})
		must(t, err)
		return member{name: "manifest.json", content: string(text)}
	}
	good := []member{{name: "c", content: config}, {name: "l", content: layers[0]}}
	var many []member
	for i := range maxArchiveFiles + 1 {
		many = append(many, member{name: fmt.Sprint(i)})
	}
	bomb := func() []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := w.Write(archive(t, member{name: "l", content: strings.Repeat("\x00", 3_000_000)}))
		must(t, err, w.Close())
		return b.Bytes()
	}
	for _, test := range []struct {
		name    string
		archive []byte
		want    string
	}{
		{"nothing", nil, "no archive"},
		{"text", []byte(strings.Repeat("text ", 1000)), "no archive"},
		{"damaged gzip", []byte("\x1f\x8bxxxxxxxxxxxxxxxxx"), "gzip"},
		{"another archive", archive(t, member{name: "etc/passwd", content: "x"}), "no archive"},
		{"cut", archive(t, append(good, manifest("c", "l"))...)[:1600], "EOF"},
		{"no images", archive(t, member{name: "manifest.json", content: "[]"}), "no image"},
		{"no JSON", archive(t, member{name: "manifest.json", content: "{"}), "manifest.json"},
		{"configuration elsewhere", archive(t, append(good, manifest("/etc/passwd", "l"))...), "not in the archive"},
		{"configuration above", archive(t, append(good, manifest("../../../../../../etc/passwd", "l"))...), "not in the archive"},
		{"layer that leads out", archive(t, append(good, manifest("c", "x"), member{name: "x", kind: tar.TypeSymlink, link: "/etc/passwd"})...), "not in the archive"},
		{"links in circles", archive(t, append(good, manifest("c", "x"), member{name: "x", kind: tar.TypeSymlink, link: "y"}, member{name: "y", kind: tar.TypeSymlink, link: "x"})...), "not in the archive"},
		{"a device as layer", archive(t, append(good, manifest("c", "x"), member{name: "x", kind: tar.TypeChar})...), "not in the archive"},
		{"layers are missing", archive(t, append(good, member{name: "manifest.json", content: `[{"Config":"c","RepoTags":["x"]}]`})...), "1 layers"},
		{"no name", archive(t, append(good, member{name: "manifest.json", content: `[{"Config":"c","Layers":["l"]}]`})...), "no name"},
		{"bad name", archive(t, append(good, member{name: "manifest.json", content: `[{"Config":"c","RepoTags":["../x"],"Layers":["l"]}]`})...), "name"},
		{"large configuration", archive(t, member{name: "c", content: strings.Repeat(" ", maxDocument+1)}, member{name: "l", content: layers[0]}, manifest("c", "l")), "bytes"},
		{"large manifest", archive(t, member{name: "manifest.json", content: strings.Repeat(" ", maxDocument+1)}), "MiB"},
		{"many files", archive(t, many...), "files"},
		{"long name", archive(t, member{name: strings.Repeat("x/", 300) + "x"}), "name"},
		{"too large", archive(t, member{name: "l", content: strings.Repeat("x", 3_000_000)}), "more bytes"},
		{"bomb", bomb(), "more bytes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := openStore(t, Limits{Image: 1_000_000})
			if test.name == "large configuration" || test.name == "large manifest" {
				s = openStore(t, Limits{})
			}
			images, err := s.Import(t.Context(), bytes.NewReader(test.archive), ImportOptions{})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("imported %+v (%v), want %q", images, err, test.want)
			}
			if left := files(t, s, spoolDir); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			if list, err := s.List(); err != nil || len(list) > 0 {
				t.Errorf("the store has %+v (%v)", list, err)
			}
		})
	}
}

// layoutOf writes an OCI layout of images by name; it returns its directory.
func layoutOf(t testing.TB, images map[string]v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	l, err := layout.Write(dir, empty.Index)
	must(t, err)
	for name, image := range images {
		options := []layout.Option{}
		if name != "" {
			options = append(options, layout.WithAnnotations(map[string]string{tagAnnotation: name}))
		}
		must(t, l.AppendImage(image, options...))
	}
	return dir
}

// tarDir packs a directory.
func tarDir(t testing.TB, dir string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.AddFS(os.DirFS(dir)), w.Close())
	return b.Bytes()
}

func TestImportLayout(t *testing.T) {
	one, two := imageOf(t, 1, 100_000), imageOf(t, 1, 100_000, 2000)
	dir := layoutOf(t, map[string]v1.Image{"one": one, "ghcr.io/x/two:3": two})
	for name, imported := range map[string]func(*Store, ImportOptions) ([]Image, error){
		"directory": func(s *Store, o ImportOptions) ([]Image, error) { return s.ImportDir(t.Context(), dir, o) },
		"archive": func(s *Store, o ImportOptions) ([]Image, error) {
			return s.Import(t.Context(), bytes.NewReader(tarDir(t, dir)), o)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, Limits{})
			images, err := imported(s, ImportOptions{})
			must(t, err)
			if len(images) != 2 {
				t.Fatalf("imported %+v", images)
			}
			for text, want := range map[string]v1.Image{"one": one, "ghcr.io/x/two:3": two} {
				ref, err := ociref.Parse(text)
				must(t, err)
				image, err := s.Get(ref)
				must(t, err)
				checkWhole(t, s, image, want)
			}
			ref, err := ociref.Parse("both")
			must(t, err)
			if images, err := imported(s, ImportOptions{Name: ref}); err == nil {
				t.Errorf("two images have one name: %+v", images)
			}
		})
	}
}

func TestImportLayoutRefuses(t *testing.T) {
	image := imageOf(t, 1, 10_000)
	layers, err := image.Layers()
	must(t, err)
	digest, err := layers[0].Digest()
	must(t, err)
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, []byte("outside"), 0o600))
	for name, damage := range map[string]func(dir, blob string) error{
		"blob is missing":   func(_, blob string) error { return os.Remove(blob) },
		"blob is damaged":   func(_, blob string) error { return os.WriteFile(blob, make([]byte, 10_000), 0o600) },
		"blob is cut":       func(_, blob string) error { return os.Truncate(blob, 100) },
		"blob leads out":    func(_, blob string) error { return errors.Join(os.Remove(blob), os.Symlink(outside, blob)) },
		"blob is a pipe":    func(_, blob string) error { return errors.Join(os.Remove(blob), unix.Mkfifo(blob, 0o600)) },
		"blob goes on":      func(_, blob string) error { return os.Truncate(blob, 1<<40) },
		"directory is gone": func(dir, _ string) error { return os.RemoveAll(dir) },
		"no marker":         func(dir, _ string) error { return os.Remove(filepath.Join(dir, "oci-layout")) },
		"index is a pipe": func(dir, _ string) error {
			p := filepath.Join(dir, "index.json")
			return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600))
		},
		"index is too large": func(dir, _ string) error { return os.Truncate(filepath.Join(dir, "index.json"), 1<<40) },
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, Limits{})
			dir := layoutOf(t, map[string]v1.Image{"one": image})
			must(t, damage(dir, filepath.Join(dir, "blobs", "sha256", digest.Hex)))
			if images, err := s.ImportDir(t.Context(), dir, ImportOptions{}); err == nil {
				t.Errorf("imported %+v", images)
			}
			if list, err := s.List(); err != nil || len(list) > 0 {
				t.Errorf("the store has %+v (%v)", list, err)
			}
		})
	}
}

// An image comes from a daemon's socket as an archive.
func TestPullDaemon(t *testing.T) {
	image := imageOf(t, 1, 50_000)
	tag, err := name.NewTag("index.docker.io/library/one:latest")
	must(t, err)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	listener, err := net.Listen("unix", socket)
	must(t, err)
	daemon := &httptest.Server{Listener: listener, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != "/images/get":
			w.WriteHeader(http.StatusBadRequest)
		case r.URL.Query().Get("names") != "docker.io/library/one:latest":
			w.WriteHeader(http.StatusNotFound)
		default:
			if err := tarball.Write(tag, image, w); err != nil {
				t.Error(err)
			}
		}
	})}}
	daemon.Start()
	defer daemon.Close()
	s := openStore(t, Limits{})
	ref, err := ociref.Parse("one")
	must(t, err)
	got, err := s.PullDaemon(t.Context(), socket, ref, ImportOptions{})
	must(t, err)
	found, err := s.Get(ref)
	must(t, err)
	config, err := image.ConfigName()
	must(t, err)
	if found.Digest != got.Digest || found.Config != config.String() || len(found.Layers) != 1 {
		t.Errorf("found %+v, want %+v", found, got)
	}
	other, err := ociref.Parse("two")
	must(t, err)
	if _, err := s.PullDaemon(t.Context(), socket, other, ImportOptions{}); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("an image that the daemon has not: %v", err)
	}
	if _, err := s.PullDaemon(t.Context(), socket+"x", ref, ImportOptions{}); err == nil {
		t.Error("there is no daemon, and no error")
	}
}
