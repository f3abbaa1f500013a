package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/disk"
)

// Reflinks returns a directory on a file system on which copies of files can share blocks, for
// as long as the test runs. It skips the test where none can be made: that takes root, loop
// devices, and mkfs.xfs.
func Reflinks(t testing.TB) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting a file system with reflinks takes root")
	}
	dir, err := os.MkdirTemp("", "smolvm-xfs-") //nolint:usetesting // t.TempDir has long names, and sockets are made below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	image, mounted := filepath.Join(dir, "xfs"), filepath.Join(dir, "m")
	const size = 1 << 30 // sparse; mkfs.xfs makes none below 300 MB
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mounted, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mkfs.xfs", "-q", image).CombinedOutput(); err != nil {
		t.Skipf("no file system with reflinks can be made: %v: %s", err, out)
	}
	if out, err := exec.CommandContext(t.Context(), "mount", "-o", "loop", image, mounted).CombinedOutput(); err != nil {
		t.Skipf("mounting is not allowed here: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mounted, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", mounted, err)
		}
	})
	if !disk.Shares(mounted) {
		t.Skip("xfs has no reflinks here")
	}
	return mounted
}
