package dockerbuild

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/catalog"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/dockerfile"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/image/registries"
	"github.com/smolvm/smolvm/internal/image/registrytest"
	"github.com/smolvm/smolvm/internal/testenv"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// newBuilder returns a builder over stores of its own, with a default image that no VMM boots and
// that has one file.
func newBuilder(t testing.TB) *Builder {
	t.Helper()
	if _, err := exec.LookPath("/usr/sbin/mke2fs"); err != nil {
		t.Skip("mke2fs is not installed")
	}
	dir := t.TempDir()
	testenv.FakeImages(t, dir)
	bootable, err := image.Open(filepath.Join(dir, "images"))
	must(t, err)
	oci, err := ocistore.Open(filepath.Join(dir, "oci"), ocistore.Limits{})
	must(t, err)
	stores := &catalog.Catalog{Bootable: bootable, OCI: oci, Base: func(ctx context.Context, _ func(smolvm.Progress)) (smolvm.Image, error) {
		return bootable.Get(ctx, smolvm.DefaultImage)
	}}
	return &Builder{Catalog: stores, CacheDir: filepath.Join(dir, "cache"), Root: func(_ context.Context, _ smolvm.Image, w io.Writer) error {
		_, err := w.Write(archiveOf(t, map[string]string{"etc/own": "own"}))
		return err
	}}
}

// archiveOf returns an archive of those files, whose owner and mode are not those of a directory of
// the test's.
func archiveOf(t testing.TB, content map[string]string) []byte {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for name, text := range content {
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o640, Uid: 7, Size: int64(len(text))}))
		_, err := io.WriteString(w, text)
		must(t, err)
	}
	must(t, w.Close())
	return archive.Bytes()
}

// write writes files to a new directory.
func write(t testing.TB, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range content {
		must(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o700), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	return dir
}

func TestBuild(t *testing.T) {
	b := newBuilder(t)
	var events []smolvm.BuildEvent
	dir := write(t, map[string]string{"Dockerfile": "FROM base\nCOPY a /a\nCMD [\"x\"]\n", "a": "A"})
	opts := smolvm.DockerfileOptions{Context: dir, Tags: []string{"app", "localhost:5000/app:2"}, Args: map[string]string{"SOURCE_DATE_EPOCH": "1000", "NONE": "x"}, Labels: map[string]string{"l": "1"},
		Progress: func(e smolvm.BuildEvent) { events = append(events, e) }}
	made, err := b.Build(t.Context(), opts)
	must(t, err)
	if diff := cmp.Diff([]string{"app", "localhost:5000/app:2"}, made.Names); diff != "" {
		t.Error(diff)
	}
	if made.Source != "docker.io/library/app:latest" || made.Config == nil || made.Config.Labels["l"] != "1" || !slices.Equal(made.Config.Cmd, []string{"x"}) {
		t.Errorf("built %+v", made)
	}
	if diff := cmp.Diff([]string{"[internal] take the files of base", "NONE", "[1/2] FROM base", "[2/2] COPY a /a"}, shown(events)); diff != "" {
		t.Error(diff)
	}
	ref, err := ociref.Parse("app")
	must(t, err)
	oci, err := b.Catalog.OCI.Get(ref)
	must(t, err)
	document, err := b.Catalog.OCI.Document(oci.Config)
	must(t, err)
	var config dockerfile.Config
	must(t, json.Unmarshal(document, &config))
	if len(config.RootFS.DiffIDs) != 2 || config.Created.Unix() != 1000 || len(config.History) != 3 || config.History[0].EmptyLayer {
		t.Errorf("configuration %s", document)
	}
	// What was built serves others, by its name and by its digest; and it is the same again.
	again, err := b.Build(t.Context(), opts)
	must(t, err)
	if again.Digest != made.Digest {
		t.Errorf("built again: %s, and before %s", again.Digest, made.Digest)
	}
	for _, from := range []string{"app", made.Digest, "localhost:5000/app:2"} {
		var archive bytes.Buffer
		layout := filepath.Join(t.TempDir(), "layout")
		child, err := b.Build(t.Context(), smolvm.DockerfileOptions{Context: dir, DockerfileText: []byte("FROM " + from + "\nCOPY --from=app /a /b\n"),
			Export: smolvm.ExportOptions{Archive: &archive, Dir: layout}})
		must(t, err)
		if len(child.Names) > 0 || child.Config.Labels["l"] != "1" {
			t.Errorf("built from %s: %+v", from, child)
		}
		// Elsewhere it is the same image.
		other, err := ocistore.Open(t.TempDir(), ocistore.Limits{})
		must(t, err)
		name, err := ociref.Parse("exported")
		must(t, err)
		imported, err := other.Import(t.Context(), &archive, ocistore.ImportOptions{Name: name})
		must(t, err)
		again, err := other.ImportDir(t.Context(), layout, ocistore.ImportOptions{Name: name})
		must(t, err)
		if imported[0].Digest != child.OCI.Digest || again[0].Digest != child.OCI.Digest {
			t.Errorf("exported %s and %s, built %s", imported[0].Digest, again[0].Digest, child.OCI.Digest)
		}
	}
	if left, err := os.ReadDir(b.CacheDir); err != nil || len(left) > 0 {
		t.Errorf("left: %v (%v)", left, err)
	}
}

// shown returns the names of the steps that were shown, and the last words of warnings.
func shown(events []smolvm.BuildEvent) []string {
	var names []string
	for _, e := range events {
		switch {
		case e.Warning != "":
			names = append(names, e.Warning[strings.LastIndex(e.Warning, " ")+1:])
		case !e.Done && e.Output == nil:
			names = append(names, e.Name)
		}
	}
	return names
}

// An image that is missing is pulled, and asked for again only by Pull.
func TestPull(t *testing.T) {
	b := newBuilder(t)
	registry := registrytest.New(t)
	from := registry.Host + "/one:1"
	push := func(content string) {
		registrytest.Push(t, from, map[string]string{"file": content}, v1.Config{Env: []string{"V=" + content}})
	}
	push("first")
	build := func(pull bool) string {
		made, err := b.Build(t.Context(), smolvm.DockerfileOptions{DockerfileText: []byte("FROM " + from + "\nLABEL v=$V\n"), Pull: pull})
		must(t, err)
		return made.Config.Labels["v"]
	}
	if got := build(false); got != "first" {
		t.Errorf("pulled %q", got)
	}
	push("second")
	if got := build(false); got != "first" {
		t.Errorf("without Pull it is %q", got)
	}
	if got := build(true); got != "second" {
		t.Errorf("with Pull it is %q", got)
	}
	registry.Close()
	_, err := b.Build(t.Context(), smolvm.DockerfileOptions{DockerfileText: []byte("FROM " + strings.Replace(from, "one", "two", 1))})
	if at := (*smolvm.DockerfileError)(nil); !errors.As(err, &at) || at.Line != 1 {
		t.Errorf("an image that can't be had: %v", err)
	}
}

// Base images come from where the configuration of registries has them, as those that are run do.
func TestPullFromMirror(t *testing.T) {
	b := newBuilder(t)
	host := registrytest.New(t).Host
	registrytest.Push(t, host+"/cache/owner/one:1", map[string]string{"file": "mirrored"}, v1.Config{})
	file := filepath.Join(t.TempDir(), "registries.conf")
	must(t, os.WriteFile(file, []byte("[[registry]]\nlocation = 'docker.io'\n[[registry.mirror]]\nlocation = '"+host+"/cache'\n[[registry]]\nlocation = 'blocked.example.com'\nblocked = true\n"), 0o600))
	t.Setenv("CONTAINERS_REGISTRIES_CONF", file)
	if _, err := b.Build(t.Context(), smolvm.DockerfileOptions{DockerfileText: []byte("FROM docker.io/owner/one:1\n")}); err != nil {
		t.Errorf("from a mirror: %v", err)
	}
	if _, err := b.Build(t.Context(), smolvm.DockerfileOptions{DockerfileText: []byte("FROM blocked.example.com/one:1\n")}); !errors.Is(err, registries.ErrBlocked) {
		t.Errorf("from a registry that is blocked: %v", err)
	}
}

// A built-in name means the image of packages, and not a registry's.
func TestBuiltIn(t *testing.T) {
	b := newBuilder(t)
	layer, err := b.Catalog.OCI.AddLayer(t.Context(), bytes.NewReader(archiveOf(t, map[string]string{"file": "packages"})))
	must(t, err)
	oci, err := b.Catalog.OCI.AddImage(t.Context(), ociref.Builtin("python"), []byte(`{"config":{"Env":["FROM=packages"]}}`), []ocistore.Layer{layer})
	must(t, err)
	b.Catalog.IsBuiltIn = func(name string) bool { return name == "python" }
	b.BuiltIn = func(ctx context.Context, _ string) (smolvm.Image, error) { return b.Catalog.Boot(ctx, oci, nil) }
	made, err := b.Build(t.Context(), smolvm.DockerfileOptions{DockerfileText: []byte("FROM python\nLABEL from=$FROM\n")})
	must(t, err)
	if made.Config.Labels["from"] != "packages" {
		t.Errorf("built %+v", made.Config)
	}
	if _, err := b.Build(t.Context(), smolvm.DockerfileOptions{DockerfileText: []byte("FROM scratch"), Tags: []string{"python"}}); err == nil || !strings.Contains(err.Error(), "smolvm's own") {
		t.Errorf("a built-in name as a tag: %v", err)
	}
}

func TestRefused(t *testing.T) {
	b := newBuilder(t)
	dir := write(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY a /\n", "a": "A", "dir/x": ""})
	must(t, os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	for _, test := range []struct {
		name string
		opts smolvm.DockerfileOptions
		want string
	}{
		{"a name of our own", smolvm.DockerfileOptions{Context: dir, Tags: []string{"base"}}, "smolvm's own"},
		{"a bad name", smolvm.DockerfileOptions{Context: dir, Tags: []string{"App"}}, "App"},
		{"a name with a digest", smolvm.DockerfileOptions{Context: dir, Tags: []string{"app@sha256:" + strings.Repeat("0", 64)}}, "no digest yet"},
		{"platform", smolvm.DockerfileOptions{Context: dir, Platform: "linux/riscv64"}, "not supported"},
		{"epoch", smolvm.DockerfileOptions{Context: dir, Args: map[string]string{"SOURCE_DATE_EPOCH": "now"}}, "SOURCE_DATE_EPOCH"},
		{"no context", smolvm.DockerfileOptions{Context: filepath.Join(dir, "none")}, "open the build's context"},
		{"no directory", smolvm.DockerfileOptions{Context: filepath.Join(dir, "a")}, "open the build's context"},
		{"no Dockerfile", smolvm.DockerfileOptions{Context: filepath.Join(dir, "dir")}, `there is no Dockerfile "`},
		{"Dockerfile elsewhere", smolvm.DockerfileOptions{Context: dir, Dockerfile: filepath.Join(dir, "other")}, `there is no Dockerfile "`},
		{"a directory as Dockerfile", smolvm.DockerfileOptions{Context: dir, Dockerfile: dir}, "is a directory"},
		{"endless Dockerfile", smolvm.DockerfileOptions{Context: dir, Dockerfile: "/dev/zero"}, "longer than"},
		{"endless text", smolvm.DockerfileOptions{ContextArchive: endless{}}, "more than"},
		{"nothing", smolvm.DockerfileOptions{}, "there is no Dockerfile"},
		{"text for a Dockerfile", smolvm.DockerfileOptions{ContextArchive: strings.NewReader("FROM scratch"), DockerfileText: []byte("FROM scratch")}, "no archive"},
		{"archive without a Dockerfile", smolvm.DockerfileOptions{ContextArchive: bytes.NewReader(archiveOf(t, map[string]string{"a": "A"}))}, "in the archive"},
		{"broken archive", smolvm.DockerfileOptions{ContextArchive: bytes.NewReader(archiveOf(t, map[string]string{"a": strings.Repeat("A", 100_000)})[:1200])}, "unexpected EOF"},
		{"a link out", smolvm.DockerfileOptions{Context: dir, DockerfileText: []byte("FROM scratch\nCOPY link /\n")}, "Dockerfile:2:"},
		{"a stage that is not there", smolvm.DockerfileOptions{Context: dir, Target: "x"}, "no stage"},
	} {
		t.Run(test.name, func(t *testing.T) {
			made, err := b.Build(t.Context(), test.opts)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("built %+v (%v), want %q", made, err, test.want)
			}
		})
	}
	if images, err := b.Catalog.OCI.List(); err != nil || len(images) > 0 {
		t.Errorf("the store has %+v (%v)", images, err)
	}
}

// endless is a stream without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return copy(p, "# comment\n"), nil }

// A Dockerfile and a context are found where docker finds them.
func TestInput(t *testing.T) {
	dir := write(t, map[string]string{
		"Dockerfile": "FROM scratch\nENV N=1\n", "other": "FROM scratch\nENV N=2\n", "a": "", "b": "", ".dockerignore": "a\n", "Dockerfile.dockerignore": "b\n", "other.dockerignore": "other*\n",
		"low/dockerfile": "FROM scratch\nENV N=3\n",
	})
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(archiveOf(t, map[string]string{"./Dockerfile": "FROM scratch\nENV N=4\n", "sub/D": "FROM scratch\nENV N=5\n", "x": "X", "y": "Y", ".dockerignore": "y"}))
	must(t, err, w.Close())
	archive := func() io.Reader { return bytes.NewReader(packed.Bytes()) }
	for _, test := range []struct {
		name  string
		opts  smolvm.DockerfileOptions
		file  string // the name of the Dockerfile
		n     int
		names []string
	}{
		{"directory", smolvm.DockerfileOptions{Context: dir}, filepath.Join(dir, "Dockerfile"), 1, []string{".dockerignore", "Dockerfile", "Dockerfile.dockerignore", "a", "low", "other", "other.dockerignore"}},
		{"another Dockerfile", smolvm.DockerfileOptions{Context: dir, Dockerfile: filepath.Join(dir, "other")}, filepath.Join(dir, "other"), 2, []string{".dockerignore", "Dockerfile", "Dockerfile.dockerignore", "a", "b", "low"}},
		{"in lower case", smolvm.DockerfileOptions{Context: filepath.Join(dir, "low")}, filepath.Join(dir, "low/dockerfile"), 3, []string{"dockerfile"}},
		{"text", smolvm.DockerfileOptions{Context: filepath.Join(dir, "low"), DockerfileText: []byte("FROM scratch\nENV N=9\n")}, "Dockerfile", 9, []string{"dockerfile"}},
		{"archive", smolvm.DockerfileOptions{ContextArchive: archive()}, "Dockerfile", 4, []string{".dockerignore", "Dockerfile", "sub", "x"}},
		{"another Dockerfile in it", smolvm.DockerfileOptions{ContextArchive: archive(), Dockerfile: "sub/D"}, "sub/D", 5, []string{".dockerignore", "Dockerfile", "sub", "x"}},
		{"a Dockerfile alone", smolvm.DockerfileOptions{ContextArchive: strings.NewReader("FROM scratch\nENV N=6\n")}, "Dockerfile", 6, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			in, err := open(t.Context(), test.opts, t.TempDir())
			must(t, err)
			defer in.close()
			if in.name != test.file || !strings.Contains(string(in.text), fmt.Sprintf("N=%d", test.n)) {
				t.Errorf("%s: %q", in.name, in.text)
			}
			names, err := in.tree.Names("")
			must(t, err)
			if diff := cmp.Diff(test.names, names); diff != "" {
				t.Error(diff)
			}
			if slices.Contains(names, "x") {
				file, err := in.tree.Lstat("x")
				must(t, err)
				if file.UID != 0 || file.Mode&0o777 != 0o640 {
					t.Errorf("x is %+v", file)
				}
				text, err := files.ReadSmall(in.tree, "x", 10)
				must(t, err)
				if string(text) != "X" {
					t.Errorf("x has %q", text)
				}
			}
		})
	}
}

// An image that was built and pushed is the same one for who pulls it elsewhere.
func TestPushBuilt(t *testing.T) {
	b := newBuilder(t)
	name := registrytest.New(t).Host + "/team/app:2"
	made, err := b.Build(t.Context(), smolvm.DockerfileOptions{
		Context: write(t, map[string]string{"Dockerfile": "FROM base\nCOPY a /a\nCMD [\"x\"]\n", "a": "A"}), Tags: []string{name},
	})
	must(t, err)
	must(t, b.Catalog.Push(t.Context(), name, smolvm.PushOptions{}))
	elsewhere := newBuilder(t).Catalog
	pulled, err := elsewhere.Pull(t.Context(), name, smolvm.PullOptions{})
	must(t, err)
	if pulled.OCI == nil || pulled.OCI.Digest != made.OCI.Digest || !slices.Equal(pulled.Config.Cmd, []string{"x"}) {
		t.Errorf("pulled %+v, built %+v", pulled, made)
	}
	// The same by its digest.
	pinned, err := elsewhere.Pull(t.Context(), strings.TrimSuffix(name, ":2")+"@"+made.OCI.Digest, smolvm.PullOptions{})
	must(t, err)
	if pinned.Digest != pulled.Digest {
		t.Errorf("by its digest it is %s, by its name %s", pinned.Digest, pulled.Digest)
	}
}
