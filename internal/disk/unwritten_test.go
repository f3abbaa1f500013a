package disk

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestUnwritten(t *testing.T) {
	base := write(t, "base", marked(0x438, "\x53\xef"))
	if err := os.Truncate(base, 1<<30); err != nil {
		t.Fatal(err)
	}
	overlay := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "overlay")
		if err := CreateOverlay(t.Context(), Overlay{Path: path, Base: base, BaseFormat: Raw}); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if path := overlay(t); !IsUnwritten(path) {
		t.Error("a new overlay is written")
	}
	cut := overlay(t)
	if err := os.Truncate(cut, 200); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"a raw disk": base, "a missing one": base + "-", "one that was cut": cut} {
		if IsUnwritten(path) {
			t.Errorf("%s is unwritten", name)
		}
	}
	qemuIO, err := exec.LookPath("qemu-io")
	if err != nil {
		t.Skip("needs qemu-io to write to the overlay")
	}
	for name, command := range map[string]string{"data": "write -P 7 300M 1k", "zeros": "write -z 0 64k", "a discard": "discard 0 64k"} {
		t.Run(name, func(t *testing.T) {
			path := overlay(t)
			if out, err := exec.Command(qemuIO, "-f", "qcow2", "-c", command, path).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if IsUnwritten(path) {
				t.Errorf("an overlay that holds %s is unwritten", name)
			}
		})
	}
}
