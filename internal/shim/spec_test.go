package shim_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/smolvm/smolvm/internal/shim"
)

// What shims of earlier builds leave is removed too: links to the drives, beside the runtime
// directory or, of a shim that stood by, elsewhere.
func TestRemoveRuntimeDir(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	dir, standby, other := filepath.Join(root, "vm"), filepath.Join(root, "slot.drives"), filepath.Join(root, "other")
	for _, made := range []string{dir, dir + ".drives", standby, other} {
		if err := os.Mkdir(made, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(standby, filepath.Join(dir, "drives")); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again does nothing
		if err := shim.RemoveRuntimeDir(dir); err != nil {
			t.Error(err)
		}
	}
	left, err := os.ReadDir(root)
	if err != nil || len(left) != 1 || left[0].Name() != "other" {
		t.Errorf("left are %v, %v", left, err)
	}
}
