package disk

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A disk that was grown is as QEMU's own tools would have made it.
func TestGrow(t *testing.T) {
	base := write(t, "base", make([]byte, 1<<20))
	path := filepath.Join(filepath.Dir(base), "overlay")
	if err := CreateOverlay(context.Background(), Overlay{Path: path, Base: base, BaseFormat: Raw}); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		size int64
		want string // error
	}{
		{1 << 20, ""}, {20 << 30, ""}, {1 << 30, "fewer than"}, {4 << 40, ""}, {4<<40 + 1, "more than"},
	} {
		err := Grow(path, QCOW2, test.size)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("to %d: %v, want %q", test.size, err, test.want)
		}
		if info, err := Inspect(path, QCOW2); test.want == "" && (err != nil || info.VirtualSize != test.size) {
			t.Errorf("after %d: %+v, %v", test.size, info, err)
		}
	}
	if !IsUnwritten(path) {
		t.Error("a disk that was grown holds something")
	}
	if err := Grow(base, QCOW2, 1<<30); err == nil || !strings.Contains(err.Error(), "no qcow2 disk") {
		t.Errorf("a raw disk: %v", err)
	}
	needQEMUImg(t)
	run(t, "qemu-img", "check", "-q", path)
	run(t, "qemu-io", "-c", "write -P 0xbb 3T 128k", "-c", "read -P 0xbb 3T 128k", "-c", "read -P 0 2T 64k", path)
	run(t, "qemu-img", "check", "-q", path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M")
	if err := Grow(path, QCOW2, 1<<30); err == nil || !strings.Contains(err.Error(), "none of those that smolvm makes") {
		t.Errorf("somebody else's disk: %v", err)
	}
}
