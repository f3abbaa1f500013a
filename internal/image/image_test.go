package image_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/imagetest"
)

func needTools(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if tool(name) == "" {
			t.Skip(name + " is not installed")
		}
	}
}

// tool finds a program, which Debian may keep out of users' PATH.
func tool(name string) string {
	for _, path := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if found, err := exec.LookPath(path); err == nil {
			return found
		}
	}
	return ""
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(tool(name), args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, errs.String())
	}
	return string(out)
}

func put(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// smallRecipe is an image of next to nothing, made without any package.
func smallRecipe(t *testing.T, dir string) image.Recipe {
	t.Helper()
	needTools(t, "mke2fs", "debugfs")
	put(t, filepath.Join(dir, "rootfs/etc/issue"), "welcome\n")
	return image.Recipe{
		Name:   "small",
		Agent:  put(t, filepath.Join(dir, "agent"), "#!/bin/sh\n"),
		Kernel: put(t, filepath.Join(dir, "kernel"), string(imagetest.TinyKernel())),
		Rootfs: filepath.Join(dir, "rootfs"),
	}
}

func open(t *testing.T, dir string) *image.Store {
	t.Helper()
	store, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return store
}

func build(t *testing.T, store *image.Store, recipe image.Recipe) smolvm.Image {
	t.Helper()
	built, err := store.Build(context.Background(), recipe)
	if err != nil {
		t.Fatal(err)
	}
	return built
}

func list(t *testing.T, store *image.Store) []smolvm.Image {
	t.Helper()
	images, err := store.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return images
}

// twoImages are images of the same store, the first without a name.
func twoImages(t *testing.T) (dir string, store *image.Store, old, current smolvm.Image) {
	t.Helper()
	work := t.TempDir()
	dir = filepath.Join(work, "store")
	store = open(t, dir)
	recipe := smallRecipe(t, work)
	old = build(t, store, recipe)
	put(t, recipe.Agent, "#!/bin/sh\n# another\n")
	return dir, store, old, build(t, store, recipe)
}

func TestGet(t *testing.T) {
	t.Parallel()
	dir, store, old, current := twoImages(t)
	ctx := context.Background()
	for ref, want := range map[string]string{
		"small":         current.Digest,
		current.Digest:  current.Digest,
		old.Digest:      old.Digest,
		old.Digest[7:]:  old.Digest,
		old.Digest[:20]: old.Digest,
	} {
		if got, err := store.Get(ctx, ref); err != nil || got.Digest != want {
			t.Errorf("Get %q = %s, %v; want %s", ref, got.Digest, err, want)
		}
	}
	got, err := store.Get(ctx, "small")
	if diff := cmp.Diff(current, got); err != nil || diff != "" {
		t.Errorf("Get differs from what Build returned (%v):\n%s", err, diff)
	}
	for _, ref := range []string{"", "no", "sha256:", old.Digest[7:14], "sha256:" + strings.Repeat("0", 64), "../small", "names", "*", strings.Repeat("[0-9]", 8)} {
		if _, err := store.Get(ctx, ref); !errors.Is(err, smolvm.ErrImageNotFound) || !strings.Contains(smolvm.HintOf(err), "smolvm image") {
			t.Errorf("Get %q: error is %v", ref, err)
		}
	}
	// A beginning that two have.
	twin := old.Digest[7:60] + "0000" + old.Digest[64:]
	put(t, filepath.Join(dir, twin, "image.json"), "{}")
	if _, err := store.Get(ctx, old.Digest[:20]); err == nil || !strings.Contains(err.Error(), "2 digests begin so") {
		t.Errorf("ambiguous: error is %v", err)
	}
}

func TestEmptyStore(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "store")
	store := open(t, dir)
	if images := list(t, store); len(images) != 0 {
		t.Errorf("List = %v", images)
	}
	removed, err := store.Prune(context.Background(), func(smolvm.Image) (bool, error) { return false, nil })
	if err != nil || len(removed) != 0 {
		t.Errorf("Prune = %v, %v", removed, err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("looking made the directory (%v)", err)
	}
}

func TestListAndNames(t *testing.T) {
	t.Parallel()
	_, store, old, current := twoImages(t)
	images := list(t, store)
	if len(images) != 2 || images[0].Digest != old.Digest || images[1].Digest != current.Digest {
		t.Fatalf("List = %+v", images)
	}
	if len(images[0].Names) != 0 || !cmp.Equal(images[1].Names, []string{"small"}) {
		t.Errorf("names are %q and %q", images[0].Names, images[1].Names)
	}
	if size := images[1].Size; size == 0 || size > 8<<20 {
		t.Errorf("size is %d", size)
	}
	if got, err := store.Get(t.Context(), "small"); err != nil || got.Size != images[1].Size {
		t.Errorf("Get has size %d, %v, and List %d", got.Size, err, images[1].Size)
	}
}

func TestRemove(t *testing.T) {
	t.Parallel()
	dir, store, old, current := twoImages(t)
	ctx := context.Background()
	if err := store.Remove(ctx, "small", unused); err != nil {
		t.Fatal(err)
	}
	if images := list(t, store); len(images) != 1 || images[0].Digest != old.Digest {
		t.Errorf("left: %+v", images)
	}
	for _, ref := range []string{"small", current.Digest} {
		if _, err := store.Get(ctx, ref); !errors.Is(err, smolvm.ErrImageNotFound) {
			t.Errorf("Get %q: error is %v", ref, err)
		}
	}
	if err := store.Remove(ctx, "small", unused); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("Remove again: error is %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, current.Digest[7:])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its files are left (%v)", err)
	}
}

func TestPrune(t *testing.T) {
	t.Parallel()
	dir, store, old, current := twoImages(t)
	// What killed processes leave: a build, a removal, a kernel half unpacked.
	put(t, filepath.Join(dir, ".build-123/image/vmlinux"), "half")
	put(t, filepath.Join(dir, ".build-removed-123/image.json"), "{}")
	put(t, filepath.Join(dir, "kernels/.kernel-123"), "half")
	removed, err := store.Prune(context.Background(), func(i smolvm.Image) (bool, error) { return len(i.Names) > 0, nil })
	if err != nil || len(removed) != 1 || removed[0].Digest != old.Digest {
		t.Fatalf("Prune = %+v, %v", removed, err)
	}
	if images := list(t, store); len(images) != 1 || images[0].Digest != current.Digest {
		t.Errorf("left: %+v", images)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	slices.Sort(names)
	want := []string{current.Digest[7:], "build.lock", "names"}
	slices.Sort(want)
	if diff := cmp.Diff(want, names); diff != "" {
		t.Error("what is left differs:\n" + diff)
	}
}

// A damaged image hides no other, can be removed, and is mended by a build.
func TestDamaged(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(dir string) error{
		"no JSON":          func(dir string) error { return os.WriteFile(filepath.Join(dir, "image.json"), []byte("{"), 0o600) },
		"another's":        func(dir string) error { return os.WriteFile(filepath.Join(dir, "image.json"), []byte("{}"), 0o600) },
		"metadata missing": func(dir string) error { return os.Remove(filepath.Join(dir, "image.json")) },
		"kernel missing":   func(dir string) error { return os.Remove(filepath.Join(dir, "vmlinux")) },
		"empty":            func(dir string) error { return errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			work := t.TempDir()
			dir := filepath.Join(work, "store")
			store, recipe := open(t, dir), smallRecipe(t, work)
			built := build(t, store, recipe)
			recipe.Name = "other"
			put(t, recipe.Agent, "another\n")
			other := build(t, store, recipe)
			if err := damage(filepath.Join(dir, built.Digest[7:])); err != nil {
				t.Fatal(err)
			}
			ctx := context.Background()
			if _, err := store.Get(ctx, "small"); err == nil || !strings.Contains(err.Error(), "damaged") {
				t.Errorf("Get: error is %v", err)
			}
			if images := list(t, store); len(images) != 2 || !strings.Contains(images[0].Source, "damaged") {
				t.Errorf("List = %+v", images)
			}
			if got, err := store.Get(ctx, "other"); err != nil || got.Digest != other.Digest {
				t.Errorf("Get other = %+v, %v", got, err)
			}
			put(t, recipe.Agent, "#!/bin/sh\n")
			recipe.Name = "small"
			if mended, err := store.Ensure(ctx, recipe); err != nil || mended.Digest != built.Digest {
				t.Errorf("Ensure = %+v, %v", mended, err)
			}
			if err := damage(filepath.Join(dir, built.Digest[7:])); err != nil {
				t.Fatal(err)
			}
			if err := store.Remove(ctx, "small", unused); err != nil {
				t.Errorf("Remove: %v", err)
			}
			if images := list(t, store); len(images) != 1 {
				t.Errorf("List = %+v", images)
			}
		})
	}
}

func TestDamagedName(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	dir := filepath.Join(work, "store")
	store, recipe := open(t, dir), smallRecipe(t, work)
	built := build(t, store, recipe)
	for _, text := range []string{"", "{", `{"digest": "sha256:../../.."}`, `{"digest": "x"}`} {
		put(t, filepath.Join(dir, "names/small"), text)
		if _, err := store.Get(context.Background(), "small"); !errors.Is(err, smolvm.ErrImageNotFound) {
			t.Errorf("%q: error is %v", text, err)
		}
		if got, err := store.Ensure(context.Background(), recipe); err != nil || got.Digest != built.Digest {
			t.Errorf("%q: Ensure = %+v, %v", text, got, err)
		}
	}
}

// unused is what is said of an image that nothing is based on.
func unused() error { return nil }

// An image that a VM is just being made of is not removed (D10).
func TestHeldImageStays(t *testing.T) {
	ctx, work := t.Context(), t.TempDir()
	store, err := image.Open(filepath.Join(work, "images"))
	if err != nil {
		t.Fatal(err)
	}
	built, err := store.Build(ctx, smallRecipe(t, work))
	if err != nil {
		t.Fatal(err)
	}
	release, err := store.Hold(built.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Remove(ctx, "small", unused); !errors.Is(err, smolvm.ErrImageInUse) {
		t.Errorf("Remove of an image that is held: %v", err)
	}
	removed, err := store.Prune(ctx, func(smolvm.Image) (bool, error) { return false, nil })
	if err != nil || len(removed) != 0 {
		t.Errorf("Prune of an image that is held: %v, %v", removed, err)
	}
	if again, err := store.Hold(built.Digest); err != nil {
		t.Errorf("a second hold: %v", err)
	} else {
		again()
	}
	release()
	if err := store.Remove(ctx, "small", func() error {
		_, err := store.Hold(built.Digest)
		if !errors.Is(err, smolvm.ErrImageNotFound) {
			t.Errorf("Hold of an image that is being removed: %v", err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if _, err := store.Hold(built.Digest); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("Hold of an image that is gone: %v", err)
	}
}
