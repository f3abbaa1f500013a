package imagebuild

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/image/ocistore"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// memoryStore is a store in memory.
type memoryStore struct {
	layers map[string][]byte
	cache  map[string]ocistore.CachedLayer
}

func newStore() *memoryStore {
	return &memoryStore{map[string][]byte{}, map[string]ocistore.CachedLayer{}}
}

func (s *memoryStore) AddLayer(_ context.Context, r io.Reader) (ocistore.Layer, error) {
	content, err := io.ReadAll(r)
	if err != nil {
		return ocistore.Layer{}, err
	}
	sum := sha256.Sum256(content)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	s.layers[digest] = content
	return ocistore.Layer{Digest: digest, DiffID: digest, Size: int64(len(content))}, nil
}

func (s *memoryStore) OpenLayer(layer ocistore.Layer) (io.ReadCloser, error) {
	content, ok := s.layers[layer.Digest]
	if !ok {
		return nil, fmt.Errorf("there is no layer %s", layer.Digest)
	}
	return io.NopCloser(bytes.NewReader(content)), nil
}

func (s *memoryStore) Cached(key string) (ocistore.CachedLayer, bool, error) {
	result, ok := s.cache[key]
	return result, ok, nil
}

func (s *memoryStore) SetCached(_ context.Context, key string, result ocistore.CachedLayer) error {
	s.cache[key] = result
	return nil
}

// archiveOf makes the archive of files with content; a name with a slash at its end is a directory,
// and content that begins with -> a symbolic link.
func archiveOf(t testing.TB, content map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(content)) {
		header := &tar.Header{Name: name, Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(content[name]))}
		if strings.HasSuffix(name, "/") {
			header.Typeflag, header.Mode = tar.TypeDir, 0o755
		}
		target, isLink := strings.CutPrefix(content[name], "->")
		if isLink {
			header.Typeflag, header.Linkname, header.Size = tar.TypeSymlink, target, 0
		}
		must(t, w.WriteHeader(header))
		if header.Typeflag == tar.TypeReg {
			_, err := w.Write([]byte(content[name]))
			must(t, err)
		}
	}
	must(t, w.Close())
	return b.Bytes()
}

// listOf lists what is in an archive, one line a file.
func listOf(t testing.TB, archive []byte) []string {
	t.Helper()
	var lines []string
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return lines
		}
		must(t, err)
		line := fmt.Sprintf("%s %o %d:%d", header.Name, header.Mode, header.Uid, header.Gid)
		switch header.Typeflag {
		case tar.TypeReg:
			content, err := io.ReadAll(r)
			must(t, err)
			line += fmt.Sprintf(" %q", content)
		case tar.TypeSymlink, tar.TypeLink:
			line += fmt.Sprintf(" %c>%s", header.Typeflag, header.Linkname)
		}
		lines = append(lines, line)
	}
}

// images are images by name.
type images map[string]Image

func (i images) Find(_ context.Context, name string) (Image, error) {
	image, ok := i[name]
	if !ok {
		return Image{}, fmt.Errorf("%q: %w", name, smolvm.ErrImageNotFound)
	}
	return image, nil
}

// fakeGuests opens fake workspaces, and notes what is done in them.
type fakeGuests struct {
	t   testing.TB
	log []string
	// open are the workspaces that were not closed.
	open int
	// fail is the command that fails.
	fail string
}

// fakeGuest is a workspace whose commands write their line to a file: /ran-N.
type fakeGuest struct {
	*fakeGuests
	ran   map[string]string
	areas map[string][]byte
}

func (f *fakeGuests) Open(_ context.Context, layers []ocistore.Layer) (Workspace, error) {
	f.log = append(f.log, fmt.Sprintf("open %d", len(layers)))
	f.open++
	return &fakeGuest{fakeGuests: f, ran: map[string]string{}, areas: map[string][]byte{}}, nil
}

func (g *fakeGuest) Run(_ context.Context, command Command) (smolvm.ExitStatus, error) {
	line := command.Args[len(command.Args)-1]
	text := fmt.Sprintf("run %s in %s as %q", line, command.Dir, command.User)
	for _, m := range command.Mounts {
		text += fmt.Sprintf(" %s<%s", m.Target, m.Source)
		for _, inside := range listOf(g.t, g.areas[m.Area]) {
			text += " [" + inside + "]"
		}
	}
	g.log = append(g.log, text)
	_, _ = io.WriteString(command.Stdout, "ran "+line+"\n")
	if line == g.fail {
		return smolvm.ExitStatus{Code: 3}, nil
	}
	if line != "true" {
		g.ran[fmt.Sprintf("ran-%s", strings.ReplaceAll(line, "/", "_"))] = strings.Join(command.Env, " ")
	}
	return smolvm.ExitStatus{}, nil
}

func (g *fakeGuest) Layer(_ context.Context, w io.Writer) error {
	_, err := w.Write(archiveOf(g.t, g.ran))
	g.ran = map[string]string{}
	return err
}

func (g *fakeGuest) Put(_ context.Context, path string, archive io.Reader) error {
	content, err := io.ReadAll(archive)
	g.log = append(g.log, fmt.Sprintf("put %s %q", path, listOf(g.t, content)))
	return err
}

func (g *fakeGuest) PutArea(_ context.Context, name string, inMemory bool, archive io.Reader) (err error) {
	g.areas[name], err = io.ReadAll(archive)
	return err
}

func (g *fakeGuest) Area(_ context.Context, name string, w io.Writer) error {
	g.areas[name] = archiveOf(g.t, map[string]string{"mount/": "", "mount/kept": "cache"})
	_, err := w.Write(g.areas[name])
	return err
}

func (g *fakeGuest) DropArea(_ context.Context, name string) error {
	delete(g.areas, name)
	return nil
}

func (g *fakeGuest) Close(context.Context) error {
	g.open--
	if len(g.areas) > 0 {
		g.t.Errorf("areas are left: %v", slices.Collect(maps.Keys(g.areas)))
	}
	return nil
}

// bench is what tests build with.
type bench struct {
	t      testing.TB
	dir    string
	store  *memoryStore
	guests *fakeGuests
	images images
	opts   Options
	args   map[string]string
}

func newBench(t testing.TB, context map[string]string) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), store: newStore(), guests: &fakeGuests{t: t}, images: images{}}
	b.write(context)
	b.addImage("base", "", map[string]string{
		"etc/passwd": "root:x:0:0::/:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n", "etc/group": "root:x:0:\nweb:x:33:\n",
		"bin/": "", "lib": "->usr/lib", "usr/lib/": "", "data": "->/srv/data", "srv/data/": "", "srv/data/there": "there", "file": "file",
	})
	b.opts = Options{
		Name: "Dockerfile", Images: b.images, Store: b.store, Workspaces: b.guests, Caches: CacheDir(t.TempDir()), Arch: "amd64", TempDir: t.TempDir(),
		Secrets: func(id string) ([]byte, bool, error) { return []byte("secret of " + id), id != "none", nil },
	}
	return b
}

func (b *bench) write(context map[string]string) {
	b.t.Helper()
	for name, content := range context {
		path := filepath.Join(b.dir, name)
		must(b.t, os.MkdirAll(filepath.Dir(path), 0o755))
		switch target, isLink := strings.CutPrefix(content, "->"); {
		case isLink:
			must(b.t, os.Symlink(target, path))
		case strings.HasSuffix(name, "/"):
			must(b.t, os.MkdirAll(path, 0o755))
		default:
			must(b.t, os.WriteFile(path, []byte(content), 0o644))
		}
	}
}

func (b *bench) addImage(name, config string, content map[string]string) {
	b.t.Helper()
	layer, err := b.store.AddLayer(b.t.Context(), bytes.NewReader(archiveOf(b.t, content)))
	must(b.t, err)
	if config == "" {
		config = `{"os":"linux","architecture":"amd64","config":{"Env":["PATH=/bin"]},"history":[{"created":"2020-01-01T00:00:00Z","created_by":"base"}]}`
	}
	b.images[name] = Image{Config: []byte(config), Layers: []ocistore.Layer{layer}}
}

// build builds.
func (b *bench) build(text string) (Result, error) {
	b.t.Helper()
	plan, err := dockerfile.New(b.t.Context(), []byte(text), dockerfile.Options{
		Name: "Dockerfile", Arch: "amd64", Args: b.args,
		Base: func(ctx context.Context, name string) (dockerfile.Config, error) {
			image, err := b.images.Find(ctx, name)
			if err != nil {
				return dockerfile.Config{}, err
			}
			return Config(image.Config)
		},
	})
	if err != nil {
		return Result{}, err
	}
	dir, err := files.OpenDir(b.dir)
	must(b.t, err)
	defer func() { _ = dir.Close() }()
	ignore, _, err := files.ReadIgnore(dir, files.IgnoreFile)
	must(b.t, err)
	b.opts.Context, b.opts.Ignored = files.Without{Tree: dir, Ignore: ignore}, func(name string) bool { ignored, _ := ignore.Matches(name); return ignored }
	b.guests.log = nil
	result, err := Build(b.t.Context(), plan, b.opts)
	if b.guests.open != 0 {
		b.t.Errorf("%d workspaces are open", b.guests.open)
	}
	if left, readErr := os.ReadDir(b.opts.TempDir); readErr != nil || len(left) > 0 {
		b.t.Errorf("left: %v (%v)", left, readErr)
	}
	return result, err
}

// lists lists the layers of an image, but for the first ones.
func (b *bench) lists(result Result, from int) [][]string {
	b.t.Helper()
	var all [][]string
	for _, layer := range result.Layers[from:] {
		all = append(all, listOf(b.t, b.store.layers[layer.Digest]))
	}
	return all
}
