package backing_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/store"
)

// rawVM makes the row of a VM whose raw disk is to be made from a layer, and returns the
// disk's path.
func (b *bench) rawVM(id, layer string) string {
	b.Helper()
	path := b.dir.Disk(id, disk.Raw)
	_, err := b.state.CreateVM(b.Context(), store.NewVM{Config: smolvm.VMConfig{ID: id}.WithDefaults(), DiskPath: path, Layer: layer, Base: layer})
	b.must(err)
	return path
}

func (b *bench) has(path string, want bool) {
	b.Helper()
	if _, err := os.Lstat(path); (err == nil) != want {
		b.Errorf("%s: %v, and that it is there should be %v", path, err, want)
	}
}

// A raw layer stays as long as it has another name, or a disk that is not there yet is to be
// made of it.
func TestCollectRawLayers(t *testing.T) {
	b := newBench(t)
	saved := filepath.Join(b.dir.Snapshots(), "disk.raw")
	b.must(os.MkdirAll(b.dir.Snapshots(), 0o700))
	b.must(os.WriteFile(saved, []byte("as it was"), 0o600))
	unlock, err := b.disks.Lock(t.Context())
	b.must(err)
	b.must(b.disks.AddLayer(t.Context(), saved, "one"))
	unlock()
	layer := b.dir.Layer("one", disk.Raw)
	b.collect()
	b.has(layer, true)
	path := b.rawVM("web", layer)
	b.must(os.Remove(saved))
	b.collect()
	b.has(layer, true)
	b.must(b.disks.Derive(t.Context(), backing.Disk{Path: path, Base: layer, BaseFormat: disk.Raw}))
	if text, err := os.ReadFile(path); err != nil || len(text) != 512 || strings.TrimRight(string(text), "\x00") != "as it was" {
		t.Errorf("the disk says %q, %v", text, err)
	}
	b.collect()
	b.has(layer, false)
	b.has(path, true)
	if left, err := b.state.Bases().On(t.Context(), layer); err != nil || len(left) != 0 {
		t.Errorf("rows are left: %q, %v", left, err)
	}
}

// Nothing is believed of what a guest writes into a raw disk: it keeps no layer, hinders
// nobody who collects them, and leads to no other file.
func TestHeadersInRawDisks(t *testing.T) {
	b := newBench(t)
	b.vm("web", b.image, disk.Raw)
	b.save("web", "layer")
	for n, name := range []string{"../layers/layer.qcow2", "/etc/passwd", "../../x"} {
		path := b.dir.Disk("raw"+string(rune('a'+n)), disk.Raw)
		b.must(disk.CreateOverlay(t.Context(), disk.Overlay{Path: path + ".tmp", Base: b.image, BaseFormat: disk.Raw, BaseName: name}), os.Rename(path+".tmp", path))
		b.must(os.Link(path, path+".new")) // and the same in the middle of a replacement
		if chain, err := b.disks.Chain(path); err != nil || len(chain) != 0 {
			t.Errorf("%s: the chain is %v, %v", name, chain, err)
		}
		if root, err := b.disks.Root(path); err != nil || root != path {
			t.Errorf("%s: the root is %s, %v", name, root, err)
		}
	}
	b.collect()
	b.layers("layer")
	b.deleteVM("web")
	b.collect()
	b.layers()
}

// A copy is made only where there is room for it, and of a raw disk only.
func TestRawDiskRefusals(t *testing.T) {
	b := newBench(t)
	full := errors.New("no room")
	var asked int64
	b.disks.Room = func(bytes int64) error { asked = bytes; return full }
	path := b.dir.Disk("web", disk.Raw)
	err := b.disks.Create(t.Context(), backing.Disk{Path: path, Base: b.image, BaseFormat: disk.Raw})
	if shares := disk.Shares(b.dir.Disks()); shares == errors.Is(err, full) || shares == (asked >= 1<<20) {
		t.Errorf("without room: %v, asked for %d bytes", err, asked)
	}
	b.must(os.RemoveAll(path))
	err = b.disks.Create(t.Context(), backing.Disk{Path: path, Base: b.image, BaseFormat: disk.QCOW2})
	if err == nil || !strings.Contains(err.Error(), "is qcow2") {
		t.Errorf("of a qcow2 disk: %v", err)
	}
	b.has(path, false)
}
