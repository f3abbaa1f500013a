package disk_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/testenv"
)

// onFileSystems runs a test in a directory in which copies share blocks, and in one in which
// they most likely don't.
func onFileSystems(t *testing.T, test func(t *testing.T, dir string)) {
	t.Helper()
	t.Run("with reflinks", func(t *testing.T) { test(t, testenv.Reflinks(t)) })
	t.Run("as it is", func(t *testing.T) { test(t, t.TempDir()) })
}

// writer changes a disk, or fails the test.
type writer struct {
	*testing.T
	*os.File
}

func (w writer) put(at int64, data string) {
	w.Helper()
	if _, err := w.WriteAt([]byte(data), at); err != nil {
		w.Fatal(err)
	}
}

func (w writer) discard(at, size int64) {
	w.Helper()
	if err := unix.Fallocate(int(w.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, size); err != nil {
		w.Fatal(err)
	}
}

// newDisk makes a disk of 16 MiB with some data.
func newDisk(t *testing.T, path string) writer {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	w := writer{t, file}
	w.put(0, "begin")
	w.put(3<<20-2, string(bytes.Repeat([]byte("x"), 2<<20))) // over the borders of what is compared
	w.put(10<<20, "to be discarded")
	if err := file.Truncate(16 << 20); err != nil {
		t.Fatal(err)
	}
	return w
}

func sameFiles(t *testing.T, a, b string) bool {
	t.Helper()
	first, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(first, second)
}

// A capture is what the disk is when it is finished, whatever has happened to it since it was
// begun, and stays so.
func TestCapture(t *testing.T) {
	onFileSystems(t, func(t *testing.T, dir string) {
		for name, change := range map[string]func(w writer){
			"nothing":       func(writer) {},
			"written again": func(w writer) { w.put(0, "other"); w.put(4<<20, "y") },
			"where a hole was": func(w writer) {
				w.put(6<<20+12345, "new")
				w.put(16<<20-1, "z")
			},
			"discarded":       func(w writer) { w.discard(0, 4096); w.discard(10<<20, 1<<20) },
			"all discarded":   func(w writer) { w.discard(0, 16<<20) },
			"here and there":  scribble,
			"written, undone": func(w writer) { w.put(0, "other"); w.put(0, "begin") },
		} {
			t.Run(name, func(t *testing.T) {
				source, target := filepath.Join(t.TempDir(), "disk"), filepath.Join(t.TempDir(), "copy")
				if disk.Shares(dir) {
					source, target = filepath.Join(dir, name+" disk"), filepath.Join(dir, name+" copy")
				}
				w := newDisk(t, source)
				c, err := disk.BeginCapture(t.Context(), target, source)
				if err != nil {
					t.Fatal(err)
				}
				change(w)
				if err := errors.Join(c.Prepare(), c.Finish(t.Context())); err != nil {
					t.Fatal(err)
				}
				if !sameFiles(t, source, target) {
					t.Error("the copy is not what the disk is")
				}
				was, err := os.ReadFile(target)
				if err != nil {
					t.Fatal(err)
				}
				w.put(1<<20, "later")
				if err := c.Close(); err != nil {
					t.Error(err)
				}
				if now, err := os.ReadFile(target); err != nil || !bytes.Equal(now, was) {
					t.Errorf("the copy has changed with the disk, %v", err)
				}
				if used, err := disk.Allocated(target); err != nil || used > 8<<20 {
					t.Errorf("the copy takes %d bytes, %v", used, err)
				}
			})
		}
	})
}

// scribble writes and discards at random.
func scribble(w writer) {
	for range 100 {
		at := rand.Int64N(15 << 20)
		if rand.IntN(3) == 0 {
			w.discard(at, rand.Int64N(1<<20))
		} else {
			w.put(at, string(bytes.Repeat([]byte{byte(1 + rand.IntN(200))}, 1+rand.IntN(9000))))
		}
	}
}

// What is not finished leaves nothing, and replaces nothing.
func TestCaptureGivenUp(t *testing.T) {
	onFileSystems(t, func(t *testing.T, dir string) {
		source, target := filepath.Join(dir, "disk"), filepath.Join(dir, "copy")
		w := newDisk(t, source)
		begin := func() *disk.Capture {
			t.Helper()
			c, err := disk.BeginCapture(t.Context(), target, source)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		gone := func(why string) {
			t.Helper()
			if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: the copy: %v", why, err)
			}
		}
		if err := begin().Close(); err != nil {
			t.Error(err)
		}
		gone("given up")
		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		c := begin()
		if err := c.Finish(canceled); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		gone("cancelled")
		c = begin()
		if err := w.Truncate(17 << 20); err != nil {
			t.Fatal(err)
		}
		if err := c.Finish(t.Context()); err == nil {
			t.Error("a disk that has another size was copied")
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		gone("of another size")
		if err := os.WriteFile(target, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := disk.BeginCapture(t.Context(), target, source); !errors.Is(err, fs.ErrExist) {
			t.Errorf("over a file: %v", err)
		}
		if text, err := os.ReadFile(target); err != nil || string(text) != "mine" {
			t.Errorf("the file that was there says %q, %v", text, err)
		}
		if _, err := disk.BeginCapture(t.Context(), target+"2", source+"no"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("of nothing: %v", err)
		}
	})
}

// A copy is a disk of its own on either kind of file system: larger if asked, in the place of
// another if asked.
func TestCopyOnFileSystems(t *testing.T) {
	onFileSystems(t, func(t *testing.T, dir string) {
		source, target := filepath.Join(dir, "disk"), filepath.Join(dir, "copy.raw")
		w := newDisk(t, source)
		o := disk.CopyOptions{Path: target, Base: source, Sync: true}
		if err := disk.Copy(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		if !sameFiles(t, source, target) {
			t.Error("the copy is not what the disk is")
		}
		w.put(0, "later")
		if err := disk.Copy(t.Context(), o); !errors.Is(err, fs.ErrExist) {
			t.Errorf("over a file: %v", err)
		}
		o.Replace, o.Size = true, 32<<20
		if err := disk.Copy(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(target)
		if err != nil || len(data) != 32<<20 || string(data[:5]) != "later" || len(bytes.Trim(data[16<<20:], "\x00")) > 0 {
			t.Errorf("the copy has %d bytes, %q..., %v", len(data), data[:5], err)
		}
		if err := disk.Grow(target, disk.Raw, 50<<20); err != nil {
			t.Error(err)
		}
		if err := disk.Grow(target, disk.Raw, 20<<20); err == nil {
			t.Error("a disk was made smaller")
		}
		if info, err := os.Stat(target); err != nil || info.Size() != 50<<20 {
			t.Errorf("it has %d bytes, %v", info.Size(), err)
		}
		for name, want := range map[string]string{target: disk.Raw, target + ".new": disk.Raw, "a.raw.claimed": disk.Raw, "a.raw.qcow2": disk.QCOW2, "a.raw.qcow2.new": disk.QCOW2, "": disk.QCOW2} {
			if got := disk.FormatOf(name); got != want {
				t.Errorf("the format of %q is %s", name, got)
			}
		}
		if disk.IsUnwritten(target) || !disk.IsUnwritten(target[:len(target)-4]+"2.raw") {
			t.Error("a raw disk is unwritten if and only if it is not there")
		}
	})
}

// What a killed process has not completed is removed, and what another is at is not.
func TestRemoveIncomplete(t *testing.T) {
	dir := t.TempDir()
	put := func(name string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	left, used, other := put(disk.TempPrefix+"left"), put(disk.TempPrefix+"used"), put("vm.raw")
	file, err := os.Open(used)
	if err == nil {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := disk.RemoveIncomplete(dir); err != nil {
		t.Error(err)
	}
	for path, want := range map[string]bool{left: false, used: true, other: true} {
		if _, err := os.Lstat(path); (err == nil) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := errors.Join(file.Close(), disk.RemoveIncomplete(dir)); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(used); err == nil {
		t.Error("it is there when nobody is at it any more")
	}
}

// What is left of a disk that was to take the place of another goes with that.
func TestRemoveLeftovers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.raw")
	for _, name := range []string{path, path + ".new", path + disk.ClaimedSuffix} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := disk.RemoveLeftovers(path); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 || left[0].Name() != "vm.raw" {
		t.Errorf("left: %v, %v", left, err)
	}
}
