package disk

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// sparse makes a file of 1 GiB with data at some places.
func sparse(t *testing.T, at ...int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sparse")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, offset := range at {
		if _, err := file.WriteAt([]byte("data"), offset); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(file.Truncate(1<<30), file.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Blocks * 512
}

func TestCopy(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		at   []int64
		size int64
		want int64
	}{
		"hole only":      {want: 1 << 30},
		"data, holes":    {at: []int64{0, 5 << 20, 700 << 20}, want: 1 << 30},
		"data at end":    {at: []int64{1<<30 - 4}, want: 1 << 30},
		"larger":         {at: []int64{12345}, size: 1 << 40, want: 1 << 40},
		"as it is, said": {at: []int64{12345}, size: 1 << 30, want: 1 << 30},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			source := sparse(t, test.at...)
			target := filepath.Join(t.TempDir(), "copy")
			if err := Copy(context.Background(), CopyOptions{Path: target, Base: source, Size: test.size}); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(target)
			if err != nil || info.Size() != test.want {
				t.Fatalf("size is %d (%v), want %d", info.Size(), err, test.want)
			}
			if used := allocated(t, target); used > 1<<20 {
				t.Errorf("takes %d bytes: its holes are filled", used)
			}
			file, err := os.Open(target)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = file.Close() }()
			for _, offset := range test.at {
				got := make([]byte, 4)
				if _, err := file.ReadAt(got, offset); err != nil || !bytes.Equal(got, []byte("data")) {
					t.Errorf("at %d: %q (%v)", offset, got, err)
				}
			}
		})
	}
}

func TestCopyRefusals(t *testing.T) {
	t.Parallel()
	source := sparse(t, 0)
	target := filepath.Join(t.TempDir(), "copy")
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	tests := map[string]struct {
		ctx            context.Context
		target, source string
		size           int64
		want           error
	}{
		"missing":       {ctx: context.Background(), target: target, source: source + "no", want: fs.ErrNotExist},
		"over a file":   {ctx: context.Background(), target: source, source: source, want: fs.ErrExist},
		"no directory":  {ctx: context.Background(), target: target + "/x/y", source: source, want: fs.ErrNotExist},
		"smaller":       {ctx: context.Background(), target: target, source: source, size: 1 << 20},
		"not continued": {ctx: canceled, target: target, source: source, want: context.Canceled},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := Copy(test.ctx, CopyOptions{Path: test.target, Base: test.source, Size: test.size})
			if err == nil && test.want != nil && errors.Is(test.want, context.Canceled) {
				t.Skip("this file system shares blocks, which can't be interrupted")
			}
			if err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("error is %v, want %v", err, test.want)
			}
			_ = os.Remove(target)
			if left, _ := os.ReadDir(filepath.Dir(target)); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// A copy that does not fit must leave nothing.
func TestCopyDiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system takes root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("mounting is not allowed here: ", err)
	}
	defer func() { _ = unix.Unmount(dir, 0) }()
	source := write(t, "source", bytes.Repeat([]byte{1}, 1<<20))
	if err := Copy(context.Background(), CopyOptions{Path: filepath.Join(dir, "copy"), Base: source}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("error is %v, want no space", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

func sum(t *testing.T, path string) string {
	t.Helper()
	s, err := Sum(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSum(t *testing.T) {
	t.Parallel()
	reference := sum(t, sparse(t, 1<<20, 900<<20))
	if got := sum(t, sparse(t, 1<<20, 900<<20)); got != reference {
		t.Error("equal files have different sums")
	}
	filled := sparse(t, 1<<20, 900<<20)
	file, err := os.OpenFile(filled, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	// Zeros where there was a hole, and not where a block begins.
	_, err = file.WriteAt(make([]byte, 300_000), 5_000_000)
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	if sum(t, filled) != reference {
		t.Error("zeros differ from a hole")
	}
	larger := sparse(t, 1<<20, 900<<20)
	if err := os.Truncate(larger, 2<<30); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"data elsewhere": sparse(t, 2<<20, 900<<20), "less data": sparse(t, 1<<20), "another size": larger} {
		if sum(t, path) == reference {
			t.Errorf("%s: the sum is the same", name)
		}
	}
}
