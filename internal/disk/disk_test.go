package disk

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func write(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func marked(offset int, mark string) []byte {
	return append(make([]byte, offset), append([]byte(mark), make([]byte, 64)...)...)
}

// bootSector is a sector with a partition table of one entry.
func bootSector(status, kind byte) []byte {
	sector := marked(510, "\x55\xaa")[:512]
	sector[446], sector[450] = status, kind
	return sector
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	tests := map[string]struct {
		path string
		want Info
		err  string
	}{
		"ext4":      {path: write(t, "d", marked(0x438, "\x53\xef")), want: Info{Format: Raw, VirtualSize: 0x438 + 66, FileSystem: "ext4"}},
		"squashfs":  {path: write(t, "d", marked(0, "hsqs")), want: Info{Format: Raw, VirtualSize: 68, FileSystem: "squashfs"}},
		"ISO":       {path: write(t, "d", marked(0x8001, "CD001")), want: Info{Format: Raw, VirtualSize: 0x8001 + 69, FileSystem: "iso9660"}},
		"MBR":       {path: write(t, "d", bootSector(0x80, 0x83)), want: Info{Format: Raw, VirtualSize: 512, FileSystem: "partitions"}},
		"GPT":       {path: write(t, "d", bootSector(0, 0xee)), want: Info{Format: Raw, VirtualSize: 512, FileSystem: "partitions"}},
		"boot code": {path: write(t, "d", bootSector(0x4d, 0x5a)), want: Info{Format: Raw, VirtualSize: 512}, err: "holds no file system"},
		"text":      {path: write(t, "d", []byte("hello")), want: Info{Format: Raw, VirtualSize: 5}, err: "holds no file system"},
		"empty":     {path: write(t, "d", nil), want: Info{Format: Raw}, err: "holds no file system"},
		"directory": {path: dir, err: "is not a disk image but a directory"},
		"missing":   {path: filepath.Join(dir, "no"), err: "no such file"},
		"cut qcow2": {path: write(t, "d", []byte(qcow2Magic+"\x00\x00\x00\x03")), err: "ends within its header"},
		"old qcow":  {path: write(t, "d", append([]byte(qcow2Magic+"\x00\x00\x00\x01"), make([]byte, 100)...)), err: "version 1"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := Probe(test.path)
			if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("error is %v, want %q", err, test.err)
			}
			if got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func needQEMUImg(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// QEMU's own tools must take our overlays for what they are, at any size.
func TestOverlayByQEMU(t *testing.T) {
	needQEMUImg(t)
	for name, size := range map[string]int64{"same size": 0, "larger": 64 << 20, "16 TiB": 16 << 40, "largest": maxOverlay} {
		t.Run(name, func(t *testing.T) {
			base := write(t, "base,with comma.img", bytes.Repeat([]byte{0xaa}, 1<<20))
			overlay := filepath.Join(filepath.Dir(base), "overlay.qcow2")
			if err := CreateOverlay(context.Background(), Overlay{Path: overlay, Base: base, BaseFormat: Raw, Size: size}); err != nil {
				t.Fatal(err)
			}
			run(t, "qemu-img", "check", "-q", overlay)
			info, err := Probe(overlay)
			want := max(size, 1<<20)
			if err != nil || info != (Info{Format: QCOW2, VirtualSize: want, Backing: base, BackingFormat: Raw}) {
				t.Errorf("Probe = %+v, %v", info, err)
			}
			if out := run(t, "qemu-img", "info", "--backing-chain", overlay); !strings.Contains(out, "backing file format: raw") {
				t.Errorf("qemu-img info:\n%s", out)
			}
			run(t, "qemu-io", "-c", "read -P 0xaa 0 64k", "-c", "write -P 0xbb 4k 128k", "-c", "read -P 0xbb 4k 128k", overlay)
			run(t, "qemu-img", "check", "-q", overlay)
			if got, err := os.ReadFile(base); err != nil || bytes.ContainsRune(got, 0xbb) || len(got) != 1<<20 {
				t.Errorf("the base has changed (%v)", err)
			}
		})
	}
}

func TestOverlayRefusals(t *testing.T) {
	base := write(t, "base", make([]byte, 1<<20))
	path := filepath.Join(t.TempDir(), "o")
	err := CreateOverlay(context.Background(), Overlay{Path: path, Base: base, BaseFormat: Raw, Size: 1 << 19})
	if err == nil || !strings.Contains(err.Error(), "fewer than") {
		t.Errorf("smaller than its base: %v", err)
	}
	err = CreateOverlay(context.Background(), Overlay{Path: path, Base: base, BaseFormat: Raw, Size: 1 << 60})
	if err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("larger than QEMU opens: %v", err)
	}
	if err := CreateOverlay(context.Background(), Overlay{Path: base, Base: base, BaseFormat: Raw}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over an existing file: %v", err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(base)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

// A disk that does not fit must leave nothing.
func TestOverlayDiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system takes root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("mounting is not allowed here: ", err)
	}
	defer func() { _ = unix.Unmount(dir, 0) }()
	base := write(t, "base", make([]byte, 1<<20))
	err := CreateOverlay(context.Background(), Overlay{Path: filepath.Join(dir, "o"), Base: base, BaseFormat: Raw})
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("error is %v, want no space", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

func FuzzProbe(f *testing.F) {
	f.Add(marked(0x438, "\x53\xef"))
	f.Add(emptyOverlay("/base", Raw, 1<<30))
	f.Add([]byte(qcow2Magic))
	f.Fuzz(func(t *testing.T, content []byte) {
		for _, format := range []string{Raw, QCOW2} {
			info, err := Info{VirtualSize: int64(len(content))}.read(bytes.NewReader(content), format)
			if err == nil && (info.VirtualSize < 0 || len(info.Backing) > maxBackingName) {
				t.Errorf("as %s: %+v", format, info)
			}
		}
	})
}

func BenchmarkCreateOverlay(b *testing.B) {
	dir := b.TempDir()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, marked(0x438, "\x53\xef"), 0o600); err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(dir, "o")
	for b.Loop() {
		if err := CreateOverlay(b.Context(), Overlay{Path: path, Base: base, BaseFormat: Raw}); err != nil {
			b.Fatal(err)
		}
		_ = os.Remove(path)
	}
}
