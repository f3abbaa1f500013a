package qemu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/vmm"
)

// A file that is not what was declared is refused, and none is waited for.
func TestOpenDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, link, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		path   string
		device bool
		want   string // in the error; empty: there is none
	}{
		"file":                {file, false, ""},
		"link to it":          {link, false, ""},
		"nothing":             {filepath.Join(dir, "missing"), false, "missing: no such file"},
		"directory":           {dir, false, dir},
		"FIFO":                {fifo, false, "is no regular file"},
		"FIFO as a device":    {fifo, true, "is no block device"},
		"file as a device":    {file, true, "is no block device"},
		"character device":    {"/dev/null", false, "is no regular file"},
		"the same, as device": {"/dev/null", true, "is no block device"},
	} {
		for _, readOnly := range []bool{false, true} {
			opened, err := openDisk(vmm.DiskFile{Path: test.path, Device: test.device}, readOnly)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v, want %q", name, err, test.want)
			}
			if err != nil {
				continue
			}
			flags, err := unix.FcntlInt(opened.Fd(), unix.F_GETFL, 0)
			if want := map[bool]int{false: unix.O_RDWR, true: unix.O_RDONLY}[readOnly]; err != nil || flags&unix.O_ACCMODE != want || flags&unix.O_NONBLOCK != 0 {
				t.Errorf("%s: flags are %#x, %v, want %#x", name, flags, err, want)
			}
			_ = opened.Close()
		}
	}
}

// QEMU's words name files as people know them.
func TestDiskNames(t *testing.T) {
	t.Parallel()
	named := func(name string) *os.File { return os.NewFile(^uintptr(0)>>1, name) }
	disks := [][]*os.File{{named("/disks/web.qcow2"), named("/images/base")}, {named("/data")}}
	got := diskNames(disks, [][]int{{5, 6}, {51}}).Replace("Could not open '/dev/fdset/51' or '/dev/fdset/5': no backing /dev/fdset/6")
	if want := "Could not open '/data' or '/disks/web.qcow2': no backing /images/base"; got != want {
		t.Errorf("QEMU says %q, want %q", got, want)
	}
}
