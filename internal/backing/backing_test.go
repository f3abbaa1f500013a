package backing_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/store"
)

// bench is a data directory with disks.
type bench struct {
	*testing.T
	dir   *datadir.Dir
	state *store.Store
	disks *backing.Disks
	image string
}

func newBench(t *testing.T) *bench { t.Helper(); return benchAt(t, filepath.Join(t.TempDir(), "data")) }

func benchAt(t *testing.T, path string) *bench {
	t.Helper()
	dir, err := datadir.Open(datadir.Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	state, err := store.Open(t.Context(), dir.Database(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = state.Close() })
	b := &bench{T: t, dir: dir, state: state, disks: backing.New(dir, state.Bases())}
	b.image = filepath.Join(dir.Images(), strings.Repeat("ab", 32), "rootfs")
	b.must(os.MkdirAll(filepath.Dir(b.image), 0o700))
	b.must(os.WriteFile(b.image, make([]byte, 1<<20), 0o600))
	return b
}

func (b *bench) must(errs ...error) {
	b.Helper()
	if err := errors.Join(errs...); err != nil {
		b.Fatal(err)
	}
}

// vm makes the row and the disk of a VM, and returns the disk's path.
func (b *bench) vm(id, base, format string) string {
	b.Helper()
	path := b.dir.Disk(id, "qcow2")
	_, err := b.state.CreateVM(b.Context(), store.NewVM{Config: smolvm.VMConfig{ID: id}.WithDefaults(), DiskPath: path, Base: base})
	b.must(err, b.disks.Create(b.Context(), backing.Disk{Path: path, Base: base, BaseFormat: format}))
	return path
}

// save makes a VM's disk a layer, as saving it does, with no snapshot that has it.
func (b *bench) save(id, layer string) {
	b.Helper()
	path := b.dir.Disk(id, "qcow2")
	unlock, err := b.disks.Lock(b.Context())
	b.must(err)
	b.must(b.disks.AddLayer(b.Context(), path, layer))
	unlock()
	b.must(b.disks.Derive(b.Context(), backing.Disk{Path: path, Base: b.dir.Layer(layer, disk.QCOW2), BaseFormat: disk.QCOW2, Replace: true}))
}

func (b *bench) layers(want ...string) {
	b.Helper()
	var got []string
	entries, err := os.ReadDir(b.dir.Layers())
	b.must(err)
	for _, entry := range entries {
		if name, ok := strings.CutSuffix(entry.Name(), ".qcow2"); ok {
			got = append(got, name)
		}
	}
	if !slices.Equal(got, want) {
		b.Errorf("layers are %q, want %q", got, want)
	}
}

func (b *bench) collect() { b.Helper(); b.must(b.disks.Collect(b.Context())) }

func (b *bench) deleteVM(id string) {
	b.Helper()
	b.must(os.Remove(b.dir.Disk(id, "qcow2")), b.state.DeleteVM(b.Context(), id))
}

// A layer stays as long as a disk needs it, through any number of others.
func TestCollect(t *testing.T) {
	b := newBench(t)
	b.vm("web", b.image, disk.Raw)
	b.save("web", "first")
	b.vm("child", b.dir.Layer("first", disk.QCOW2), disk.QCOW2)
	b.save("web", "second")
	b.save("child", "third")
	b.collect()
	b.layers("first", "second", "third")
	chain, err := b.disks.Chain(b.dir.Disk("child", "qcow2"))
	want := []backing.File{{Path: b.dir.Layer("third", disk.QCOW2), Format: disk.QCOW2}, {Path: b.dir.Layer("first", disk.QCOW2), Format: disk.QCOW2}, {Path: b.image, Format: disk.Raw}}
	if err != nil || !slices.Equal(chain, want) {
		t.Errorf("the chain is %v, %v; want %v", chain, err, want)
	}
	b.deleteVM("web")
	b.collect()
	b.layers("first", "third")
	b.deleteVM("child")
	b.collect()
	b.layers()
	if left, err := b.state.Bases().On(t.Context(), b.dir.Layer("first", disk.QCOW2)); err != nil || len(left) != 0 {
		t.Errorf("rows are left: %q, %v", left, err)
	}
}

// What is written down keeps a layer whose user the files don't show: one that is made,
// and a VM's disk that somebody has put elsewhere for a while. What is not written down is
// seen by the files.
func TestRowsAndFilesKeepLayers(t *testing.T) {
	b := newBench(t)
	b.vm("web", b.image, disk.Raw)
	b.save("web", "layer")
	path := b.dir.Disk("web", "qcow2")
	elsewhere := filepath.Join(t.TempDir(), "disk")
	b.must(os.Rename(path, elsewhere))
	b.collect()
	b.layers("layer")
	b.must(os.Rename(elsewhere, path))
	b.must(b.state.Bases().Remove(t.Context(), path, b.dir.Layer("layer", disk.QCOW2)))
	b.collect()
	b.layers("layer")
	b.must(b.state.Bases().Add(t.Context(), filepath.Join(b.dir.VM("gone"), "x.overlay"), b.dir.Layer("layer", disk.QCOW2)))
	b.deleteVM("web")
	b.collect()
	b.layers()
}

// A disk that can't be read counts as a doubt: nothing is removed, and the error names it
// (D3).
func TestUnreadableDiskKeepsLayers(t *testing.T) {
	replace := func(target string) func(b *bench, path string) {
		return func(b *bench, path string) { b.must(os.Remove(path), os.Symlink(target, path)) }
	}
	for name, test := range map[string]struct {
		harm func(b *bench, path string)
		want error
	}{
		"a link to a volume that is not mounted": {replace("/nonexistent/volume/disk.qcow2"), unix.ENOENT},
		"a link to itself":                       {replace("web.qcow2"), unix.ELOOP},
		"an error of the medium":                 {replace("/proc/self/mem"), unix.EIO}, // that is what reading at 0 gives
		"a directory":                            {func(b *bench, path string) { b.must(os.Remove(path), os.Mkdir(path, 0o700)) }, nil},
		"a header that is cut off":               {func(b *bench, path string) { b.must(os.Truncate(path, 20)) }, nil},
		"no more files": {func(b *bench, _ string) {
			var limit unix.Rlimit
			b.must(unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
			b.Cleanup(func() { b.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) })
			entries, err := os.ReadDir("/proc/self/fd")
			b.must(err)
			b.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(entries)), Max: limit.Max}))
		}, unix.EMFILE},
	} {
		for _, written := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, written down: %v", name, written), func(t *testing.T) {
				b := newBench(t)
				b.vm("web", b.image, disk.Raw)
				b.save("web", "layer")
				path := b.dir.Disk("web", "qcow2")
				if !written { // as by a version that wrote nothing down
					b.must(b.state.Bases().Remove(t.Context(), path, b.dir.Layer("layer", disk.QCOW2)))
				}
				test.harm(b, path)
				err := b.disks.Collect(t.Context())
				if err == nil || test.want != nil && !errors.Is(err, test.want) {
					t.Errorf("Collect: %v, want %v", err, test.want)
				}
				if !errors.Is(test.want, unix.EMFILE) {
					b.layers("layer")
				} else if _, err := os.Lstat(b.dir.Layer("layer", disk.QCOW2)); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// A copy's disks are based on the copy's files, also where names are still absolute as
// they were made until now; what is outside stays what it is (cases 21, 24).
func TestNamesAreOfThisDirectory(t *testing.T) {
	b := newBench(t)
	work := t.TempDir()
	for name, base := range map[string]struct{ name, want string }{
		"an image of the original": {"/old/place/images/" + strings.Repeat("ab", 32) + "/rootfs", b.image},
		"our own image":            {b.image, b.image},
		"a name of ours":           {"../images/" + strings.Repeat("ab", 32) + "/rootfs", b.image},
	} {
		path := b.dir.Disk("disk", "qcow2")
		b.must(disk.CreateOverlay(t.Context(), disk.Overlay{Path: path, Base: b.image, BaseFormat: disk.Raw, BaseName: base.name, Replace: true}))
		if root, err := b.disks.Root(path); err != nil || root != base.want {
			t.Errorf("%s: the root is %s, %v; want %s", name, root, err, base.want)
		}
	}
	user := filepath.Join(work, "rootfs.img")
	b.must(os.WriteFile(user, make([]byte, 1<<20), 0o600))
	path := b.vm("web", user, disk.Raw)
	if root, err := b.disks.Root(path); err != nil || root != user {
		t.Errorf("the root is %s, %v; want %s", root, err, user)
	}
	// The user's file as what a guest may have made of it.
	evil := filepath.Join(work, "evil.qcow2")
	b.must(disk.CreateOverlay(t.Context(), disk.Overlay{Path: evil, Base: user, BaseFormat: disk.Raw}))
	path = b.vm("evil", evil, disk.QCOW2)
	if chain, err := b.disks.Chain(path); err == nil || !strings.Contains(err.Error(), "is based on another file") {
		t.Errorf("a chain that leads out of what was named: %v, %v", chain, err)
	}
	for _, name := range []string{"../../etc/passwd", "passwd", "../disks/../../x"} {
		b.must(disk.CreateOverlay(t.Context(), disk.Overlay{Path: path, Base: user, BaseFormat: disk.Raw, BaseName: name, Replace: true}))
		if chain, err := b.disks.Chain(path); err == nil {
			t.Errorf("a base %q gives the chain %v", name, chain)
		}
	}
	loop := b.dir.Layer("loop", disk.QCOW2)
	b.must(disk.CreateOverlay(t.Context(), disk.Overlay{Path: loop, Base: evil, BaseFormat: disk.QCOW2, BaseName: "../layers/loop.qcow2"}))
	if _, err := b.disks.Chain(loop); err == nil {
		t.Error("a disk that is based on itself has a chain")
	}
}
