package catalog

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/image/registrytest"
	"github.com/smolvm/smolvm/internal/testenv"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func requireMke2fs(t testing.TB) {
	t.Helper()
	for _, path := range []string{"mke2fs", "/usr/sbin/mke2fs", "/sbin/mke2fs"} {
		if _, err := exec.LookPath(path); err == nil {
			return
		}
	}
	t.Skip("mke2fs is not installed")
}

// newCatalog returns a catalog with stores of its own, and a default image that no VMM boots.
func newCatalog(t testing.TB) *Catalog {
	t.Helper()
	requireMke2fs(t)
	dir := t.TempDir()
	testenv.FakeImages(t, dir)
	bootable, err := image.Open(filepath.Join(dir, "images"))
	must(t, err)
	oci, err := ocistore.Open(filepath.Join(dir, "oci"), ocistore.Limits{})
	must(t, err)
	return &Catalog{Bootable: bootable, OCI: oci, Base: func(ctx context.Context, _ func(smolvm.Progress)) (smolvm.Image, error) {
		return bootable.Get(ctx, smolvm.DefaultImage)
	}}
}

// An image is pulled when it is missing, shares the files of the default image, and says what
// its configuration does.
func TestEnsure(t *testing.T) {
	c, ctx := newCatalog(t), t.Context()
	ref := registrytest.New(t).Host + "/app:1"
	registrytest.Push(t, ref, map[string]string{"file": "first"}, v1.Config{Cmd: []string{"run"}, Env: []string{"A=b"}, ExposedPorts: map[string]struct{}{"80/tcp": {}}})
	if _, err := c.Ensure(ctx, ref, smolvm.PullNever, nil); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("it is there without being pulled: %v", err)
	}
	var mu sync.Mutex
	phases := map[string]int{}
	first, err := c.Ensure(ctx, ref, "", func(p smolvm.Progress) {
		mu.Lock()
		defer mu.Unlock()
		phases[p.Phase]++
	})
	must(t, err)
	if !slices.Equal(first.Names, []string{ref}) || first.OCI == nil || first.OCI.Reference != ref || first.Source != ref ||
		first.Config == nil || !slices.Equal(first.Config.Cmd, []string{"run"}) || !slices.Equal(first.Config.ExposedPorts, []string{"80/tcp"}) {
		t.Errorf("the image is %+v", first)
	}
	if phases["pull "+ref] == 0 || phases["unpack layers"] == 0 {
		t.Errorf("phases are %v", phases)
	}
	base, err := c.Bootable.Get(ctx, smolvm.DefaultImage)
	must(t, err)
	for ours, theirs := range map[string]string{first.KernelPath: base.KernelPath, first.InitrdPath: base.InitrdPath} {
		a, errA := os.Stat(ours)
		b, errB := os.Stat(theirs)
		must(t, errA, errB)
		if !os.SameFile(a, b) {
			t.Errorf("%s is not %s", ours, theirs)
		}
	}
	// By each of its names it is the same, and nothing is asked of the registry.
	for _, text := range []string{ref, first.Digest, first.Digest[:20], first.OCI.Digest, strings.TrimPrefix(first.OCI.Digest, "sha256:")[:12]} {
		for _, policy := range []smolvm.PullPolicy{smolvm.PullNever, smolvm.PullMissing} {
			if found, err := c.Ensure(ctx, text, policy, nil); err != nil || found.Digest != first.Digest {
				t.Errorf("%s is %s, %v", text, found.Digest, err)
			}
		}
		if found, err := c.Find(ctx, text); err != nil || found.Digest != first.Digest {
			t.Errorf("%s is found as %s, %v", text, found.Digest, err)
		}
	}
	// The name means another image now.
	registrytest.Push(t, ref, map[string]string{"file": "second"}, v1.Config{})
	if found, err := c.Ensure(ctx, ref, smolvm.PullMissing, nil); err != nil || found.Digest != first.Digest {
		t.Errorf("without being pulled again it is %s, %v", found.Digest, err)
	}
	second, err := c.Ensure(ctx, ref, smolvm.PullAlways, nil)
	must(t, err)
	if second.Digest == first.Digest || !slices.Equal(second.Names, []string{ref}) {
		t.Errorf("pulled again it is %+v", second)
	}
	first, err = c.Bootable.Get(ctx, first.Digest)
	must(t, err)
	if named, err := c.HasName(first); err != nil || named {
		t.Errorf("the first has a name still: %v, %v", named, err)
	}
}

// An image is made anew for another agent, with the root file system that it has.
func TestNewBase(t *testing.T) {
	c, ctx := newCatalog(t), t.Context()
	ref := registrytest.New(t).Host + "/app"
	registrytest.Push(t, ref, map[string]string{"file": "content"}, v1.Config{})
	first, err := c.Ensure(ctx, ref, "", nil)
	must(t, err)
	recipe := testenv.FakeRecipe(t, t.TempDir())
	recipe.Name = smolvm.DefaultImage
	must(t, os.WriteFile(recipe.Agent, []byte("another agent"), 0o700))
	_, err = c.Bootable.Build(ctx, recipe)
	must(t, err)
	second, err := c.Ensure(ctx, ref, "", nil)
	must(t, err)
	if second.Digest == first.Digest || len(second.Names) != 1 {
		t.Errorf("with another agent it is %+v", second)
	}
	a, errA := os.Stat(first.RootfsPath)
	b, errB := os.Stat(second.RootfsPath)
	must(t, errA, errB)
	if !os.SameFile(a, b) {
		t.Error("the root file system was written again")
	}
	images, err := c.List(ctx)
	must(t, err)
	i := slices.IndexFunc(images, func(i smolvm.Image) bool { return i.Digest == first.Digest })
	if i < 0 || len(images[i].Names) > 0 {
		t.Errorf("the images are %+v", images)
	}
}

// A registry's mirror is asked first, and the image keeps its name.
func TestMirror(t *testing.T) {
	c, ctx := newCatalog(t), t.Context()
	host := registrytest.New(t).Host
	registrytest.Push(t, host+"/cache/owner/app:1", map[string]string{"file": "content"}, v1.Config{})
	file := filepath.Join(t.TempDir(), "registries.conf")
	must(t, os.WriteFile(file, []byte("[[registry]]\nlocation = 'docker.io'\n[[registry.mirror]]\nlocation = '127.0.0.1:1'\n[[registry.mirror]]\nlocation = '"+host+"/cache'\n"), 0o600))
	t.Setenv("CONTAINERS_REGISTRIES_CONF", file)
	found, err := c.Ensure(ctx, "owner/app:1", "", nil)
	if err != nil || !slices.Equal(found.Names, []string{"owner/app:1"}) || found.OCI.Reference != "docker.io/owner/app:1" {
		t.Errorf("by the mirror it is %+v, %v", found, err)
	}
}

// What can't be had is refused with what was tried.
func TestRefused(t *testing.T) {
	c, ctx := newCatalog(t), t.Context()
	host := registrytest.New(t).Host
	for _, test := range []struct {
		text string
		is   error
		says string
	}{
		{host + "/nothing:1", smolvm.ErrImageNotFound, "can't be had"},
		{"127.0.0.1:1/nothing", smolvm.ErrImageNotFound, "connection refused"},
		{"BAD:NAME:", smolvm.ErrImageNotFound, "name \"BAD:NAME:\""},
	} {
		_, err := c.Ensure(ctx, test.text, "", nil)
		if !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v", test.text, err)
		}
	}
	if _, err := c.Pull(ctx, host+"/nothing", smolvm.PullOptions{Platform: "linux/riscv64"}); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("for another platform: %v", err)
	}
}

// Names go one by one, and with the last what only it led to.
func TestRemove(t *testing.T) {
	c, ctx := newCatalog(t), t.Context()
	ref := registrytest.New(t).Host + "/app:1"
	registrytest.Push(t, ref, map[string]string{"file": "content"}, v1.Config{})
	made, err := c.Ensure(ctx, ref, "", nil)
	must(t, err)
	first, err := ociref.Parse(ref)
	must(t, err)
	other, err := ociref.Parse("mine:2")
	must(t, err)
	oci, err := c.OCI.Get(first)
	must(t, err)
	must(t, c.OCI.Tag(ctx, oci, other))
	hidden, err := ociref.Parse(smolvm.DefaultImage)
	must(t, err, c.OCI.Tag(ctx, oci, hidden))
	if base, err := c.Find(ctx, smolvm.DefaultImage); err != nil || base.OCI != nil || !slices.Equal(base.Hides, []string{"docker.io/library/base:latest"}) {
		t.Errorf("the default image, whose name is another's too, is %+v, %v", base, err)
	}
	if found, err := c.Find(ctx, "docker.io/library/base"); err != nil || found.Digest != made.Digest {
		t.Errorf("by its whole name the other one is %+v, %v", found, err)
	}
	must(t, c.OCI.Remove(ctx, hidden))
	found, err := c.Find(ctx, "mine:2")
	must(t, err)
	if found.Digest != made.Digest || len(found.Names) != 2 {
		t.Errorf("by its other name it is %+v", found)
	}
	if done, err := c.Untag(ctx, ref, found); err != nil || !done {
		t.Errorf("one of two names: %v, %v", done, err)
	}
	if done, err := c.Untag(ctx, "mine:2", found); err != nil || done {
		t.Errorf("the last name: %v, %v", done, err)
	}
	must(t, c.Bootable.Remove(ctx, made.Digest, func() error { return nil }))
	// Until it is forgotten it can be made bootable again.
	if found, err := c.Find(ctx, "mine:2"); err != nil || found.Digest != "" || found.OCI == nil {
		t.Errorf("not bootable it is %+v, %v", found, err)
	}
	must(t, c.Forget(ctx, found))
	if images, err := c.List(ctx); err != nil || len(images) != 1 {
		t.Errorf("left are %+v, %v", images, err)
	}
	if _, err := c.OCI.Document(oci.Digest); err == nil {
		t.Error("its manifest is left")
	}
}

// Of pulled images those that were not used for longest go, when there are too many.
func TestTrim(t *testing.T) {
	c, ctx := newCatalog(t), t.Context()
	host := registrytest.New(t).Host
	names := map[string]string{}
	used := ""
	c.InUse = func(_ context.Context, digest string) error {
		if digest == used {
			return smolvm.ErrImageInUse
		}
		return nil
	}
	pull := func(name string) smolvm.Image {
		t.Helper()
		names[name] = host + "/" + name
		registrytest.Push(t, names[name], map[string]string{"file": name + strings.Repeat("x", 100_000)}, v1.Config{Labels: map[string]string{"n": name}})
		made, err := c.Pull(ctx, names[name], smolvm.PullOptions{})
		must(t, err)
		return made
	}
	used = pull("used").Digest
	pull("kept")
	kept, err := ociref.Parse(names["kept"])
	must(t, err)
	oci, err := c.OCI.Get(kept)
	must(t, err)
	own, err := ociref.Parse("own:1")
	must(t, err, c.OCI.Tag(ctx, oci, own))
	pull("old")
	pull("older")
	// What is used is not the oldest any more.
	_, err = c.Ensure(ctx, names["old"], "", nil)
	must(t, err)
	c.MaxBytes, err = c.usage(ctx)
	must(t, err)
	pull("new")
	for name, want := range map[string]bool{"used": true, "kept": true, "old": true, "older": false, "new": true} {
		found, err := c.Find(ctx, names[name])
		if got := err == nil && found.Digest != ""; got != want {
			t.Errorf("%s is there: %v (%v), want %v", name, got, err, want)
		}
	}
}

// A name of our own hides the registry's image of that name, which its whole name reaches.
func TestBuiltinHides(t *testing.T) {
	c, ctx := newCatalog(t), t.Context()
	add := func(ref ociref.Ref, content string) ocistore.Image {
		t.Helper()
		layer, err := c.OCI.AddLayer(ctx, bytes.NewReader(registrytest.Archive(t, map[string]string{"file": content})))
		must(t, err)
		added, err := c.OCI.AddImage(ctx, ref, []byte("{}"), []ocistore.Layer{layer})
		must(t, err)
		return added
	}
	registry, err := ociref.Parse("python")
	must(t, err)
	theirs := add(registry, "theirs")
	if found, err := c.Find(ctx, "python"); err != nil || found.OCI.Digest != theirs.Digest {
		t.Errorf("python is %+v, %v", found.OCI, err)
	}
	ours := add(ociref.Builtin("python"), "ours")
	for name, want := range map[string]string{"python": ours.Digest, "python:latest": theirs.Digest, "docker.io/library/python": theirs.Digest} {
		if found, err := c.Find(ctx, name); err != nil || found.OCI.Digest != want {
			t.Errorf("%s is %+v, %v", name, found.OCI, err)
		}
	}
	made, err := c.Boot(ctx, ours, nil)
	must(t, err)
	if !slices.Equal(made.Names, []string{"python"}) || strings.Contains(made.Source, "smolvm.invalid") {
		t.Errorf("it is called %q, from %q", made.Names, made.Source)
	}
}
