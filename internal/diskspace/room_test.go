package diskspace_test

import (
	"errors"
	"math"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/diskspace"
)

// No size takes what is left to the host, and one that has no room does not keep out those that have.
func TestRoom(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	free, total, err := diskspace.Of(dir)
	if err != nil || free < 512<<20 {
		t.Skipf("the file system has %d bytes (%v)", free, err)
	}
	var room diskspace.Room
	for _, test := range []struct {
		size int64
		want error
	}{
		{total, unix.ENOSPC},
		{1, nil},
		{math.MaxInt64, unix.ENOSPC},
		{math.MaxInt64, unix.ENOSPC},
		{1 << 20, nil},
		{0, nil},
	} {
		if err := room.Take(int(file.Fd()), test.size); !errors.Is(err, test.want) {
			t.Errorf("%d bytes: %v, want %v", test.size, err, test.want)
		}
	}
	if err := new(diskspace.Room).Take(-1, 1); !errors.Is(err, unix.EBADF) {
		t.Errorf("a file that is closed: %v", err)
	}
}
