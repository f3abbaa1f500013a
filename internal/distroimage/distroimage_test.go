package distroimage

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/catalog"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/testenv"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// newImages returns images of packages in a directory of their own, whose default image no VMM boots,
// and in which no VM can be made.
func newImages(t testing.TB) *Images {
	t.Helper()
	dir := t.TempDir()
	testenv.FakeImages(t, dir)
	bootable, err := image.Open(filepath.Join(dir, "images"))
	must(t, err)
	oci, err := ocistore.Open(filepath.Join(dir, "oci"), ocistore.Limits{})
	must(t, err)
	all := &catalog.Catalog{Bootable: bootable, OCI: oci, IsBuiltIn: func(name string) bool {
		_, ok := distro.BuiltIn(name)
		return ok
	}, Base: func(ctx context.Context, _ func(smolvm.Progress)) (smolvm.Image, error) {
		return bootable.Get(ctx, smolvm.DefaultImage)
	}}
	return &Images{Catalog: all, Dir: filepath.Join(dir, "packages")}
}

// add adds an image to the store that says that it was built of a recipe's key.
func add(t testing.TB, i *Images, ref ociref.Ref, key string) {
	t.Helper()
	config := `{"architecture":"amd64","os":"linux","config":{"Labels":{"` + distro.KeyLabel + `":"` + key + `"}}}`
	_, err := i.Catalog.OCI.AddImage(t.Context(), ref, []byte(config), nil)
	must(t, err)
}

// What is asked for is a recipe and a name; names that are taken, or can't be, are refused.
func TestAsked(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tools.yaml")
	must(t, os.WriteFile(file, []byte("name: tools\npackages: [git]\n"), 0o600))
	for name, test := range map[string]struct {
		opts     smolvm.BuildOptions
		ref      string // the familiar name
		packages []string
		err      string
	}{
		"built in":                   {opts: smolvm.BuildOptions{Name: "node"}, ref: "/node:latest", packages: []string{"ca-certificates", "nodejs", "npm"}},
		"packages":                   {opts: smolvm.BuildOptions{Name: "mine", Packages: []string{"jq"}}, ref: "mine:latest", packages: []string{"jq"}},
		"a recipe":                   {opts: smolvm.BuildOptions{RecipeFile: file}, ref: "tools:latest", packages: []string{"git"}},
		"a recipe by another name":   {opts: smolvm.BuildOptions{RecipeFile: file, Name: "more", Packages: []string{"jq"}}, ref: "more:latest", packages: []string{"git", "jq"}},
		"no name":                    {opts: smolvm.BuildOptions{Packages: []string{"jq"}}, err: "no name"},
		"a built-in name":            {opts: smolvm.BuildOptions{Name: "dev", Packages: []string{"jq"}}, err: "built-in"},
		"the default image's name":   {opts: smolvm.BuildOptions{Name: "base", Packages: []string{"jq"}}, err: "built-in"},
		"a name with a digest":       {opts: smolvm.BuildOptions{Name: "a@sha256:" + strings.Repeat("0", 64), Packages: []string{"jq"}}, err: "digest"},
		"no name of an image":        {opts: smolvm.BuildOptions{Name: "A B", Packages: []string{"jq"}}, err: "A B"},
		"no package's name":          {opts: smolvm.BuildOptions{Name: "mine", Packages: []string{"--help"}}, err: "--help"},
		"a recipe that is not there": {opts: smolvm.BuildOptions{RecipeFile: file + "x"}, err: "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			ref, recipe, err := asked(test.opts)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("the error is %v, want %q in it", err, test.err)
				}
				return
			}
			if err != nil || !slices.Equal(recipe.Packages, test.packages) || !strings.HasSuffix(ref.String(), test.ref) || ref.IsBuiltin() != (name == "built in") {
				t.Errorf("it is %s of %q (%v)", ref, recipe.Packages, err)
			}
		})
	}
}

// An image is built again when its recipe is another one, and not before.
func TestCurrent(t *testing.T) {
	i := newImages(t)
	recipe, _ := distro.BuiltIn("python")
	key, err := recipe.Key(hostRelease())
	must(t, err)
	ref := ociref.Builtin("python")
	for _, test := range []struct {
		key  string // of the image that is there; empty: none
		want bool
	}{{"", false}, {"another", false}, {key, true}} {
		if test.key != "" {
			add(t, i, ref, test.key)
		}
		made, current, err := i.current(t.Context(), ref, recipe, nil)
		if err != nil || current != test.want || test.want && (made.RootfsPath == "" || !slices.Contains(made.Names, "python")) {
			t.Errorf("with key %q it is current: %v, %+v (%v)", test.key, current, made.Names, err)
		}
	}
	// So neither a start nor a build fetches anything.
	if _, err := i.Ensure(t.Context(), "python", smolvm.PullNever, nil); err != nil {
		t.Errorf("ensure an image that is there: %v", err)
	}
	if _, err := i.Build(t.Context(), smolvm.BuildOptions{Name: "python"}); err != nil {
		t.Errorf("build an image that is there: %v", err)
	}
}

func TestEnsureMissing(t *testing.T) {
	i := newImages(t)
	if _, err := i.Ensure(t.Context(), "no-such", smolvm.PullMissing, nil); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("a name that is not built in: %v", err)
	}
	if _, err := i.Ensure(t.Context(), "node", smolvm.PullNever, nil); !errors.Is(err, smolvm.ErrImageNotFound) || !strings.Contains(smolvm.HintOf(err), "image build node") {
		t.Errorf("an image that is not to be fetched: %v (%s)", err, smolvm.HintOf(err))
	}
	if left, err := os.ReadDir(filepath.Dir(i.Dir)); err != nil || slices.ContainsFunc(left, func(e os.DirEntry) bool { return e.Name() == "packages" }) {
		t.Errorf("something was made: %v (%v)", left, err)
	}
}

// A build waits for another one, and no longer than its context; what is kept is not removed meanwhile.
func TestAnotherBuild(t *testing.T) {
	i := newImages(t)
	unlock, err := distro.Builder{Dir: i.Dir}.Lock(t.Context())
	must(t, err)
	kept := filepath.Join(i.Dir, "archives", "a.deb")
	must(t, os.MkdirAll(filepath.Dir(kept), 0o700), os.WriteFile(kept, make([]byte, 1000), 0o600))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := i.Build(ctx, smolvm.BuildOptions{Name: "mine", Packages: []string{"jq"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("a build that is given up: %v", err)
	}
	if freed, err := i.Prune(); freed != 0 || err != nil {
		t.Errorf("while an image is built %d bytes are freed (%v)", freed, err)
	}
	if _, err := os.Stat(kept); err != nil {
		t.Error(err)
	}
	unlock()
	if freed, err := i.Prune(); freed != 1000 || err != nil {
		t.Errorf("%d bytes are freed (%v)", freed, err)
	}
	left, err := os.ReadDir(i.Dir)
	if err != nil || len(left) != 1 || left[0].Name() != distro.LockName {
		t.Errorf("%v are left (%v)", left, err)
	}
	if freed, err := i.Prune(); freed != 0 || err != nil {
		t.Errorf("once more %d bytes are freed (%v)", freed, err)
	}
}

// Nothing is there before the first build.
func TestPruneNothing(t *testing.T) {
	i := newImages(t)
	if freed, err := i.Prune(); freed != 0 || err != nil {
		t.Errorf("%d bytes are freed (%v)", freed, err)
	}
}

// What a builder makes is in the catalog, by its name, and bootable.
func TestStore(t *testing.T) {
	i := newImages(t)
	removed := ""
	i.Remove = func(_ context.Context, digest string) error {
		removed = digest
		return nil
	}
	s := store{images: i}
	config := []byte(`{"architecture":"amd64","os":"linux","config":{"Cmd":["sh"]}}`)
	made, err := s.AddImage(t.Context(), "mine", config, nil)
	if err != nil || made.OCI == nil || made.RootfsPath == "" {
		t.Fatalf("the image is %+v (%v)", made, err)
	}
	found, err := i.Catalog.Find(t.Context(), "mine")
	if err != nil || found.Digest != made.Digest {
		t.Errorf("by its name it is %q (%v)", found.Digest, err)
	}
	if _, err := s.AddImage(t.Context(), "A B", config, nil); err == nil {
		t.Error("a name that none can have is taken")
	}
	if err := s.Forget(t.Context(), made); err != nil || removed != made.Digest {
		t.Errorf("%q is removed (%v)", removed, err)
	}
}
