package hostdir

import (
	"math"
	"testing"

	"golang.org/x/sys/unix"
)

// A guest can't take what is left of the host's disk.
func TestRoom(t *testing.T) {
	t.Parallel()
	dir := outside(t)
	g := newGuest(t, dir, Options{})
	file := g.find("file")
	opened, errno := g.ask(opOpen, file, u32(unix.O_RDWR), u32(0))
	if errno != 0 {
		t.Fatal(errno)
	}
	handle := u64(opened.u64())
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	for _, length := range []uint64{fs.Bavail * uint64(fs.Bsize), math.MaxInt64, math.MaxInt64 - 4096} {
		if _, errno := g.ask(opFallocate, file, handle, u64(0), u64(length), u32(0), u32(0)); errno != unix.ENOSPC {
			t.Errorf("%d bytes: %v, want %v", length, errno, unix.ENOSPC)
		}
	}
	if _, errno := g.ask(opWrite, file, handle, u64(0), u32(1), u32(0), u64(0), u32(0), u32(0), []byte("x")); errno != 0 {
		t.Error(errno)
	}
}
