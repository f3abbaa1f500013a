package hostdir

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

const (
	// reserve is what a guest leaves of the host's disk, in bytes.
	reserve = 256 << 20
	// lookInterval is how much a guest may write, in bytes, until the disk is looked at again.
	lookInterval = 16 << 20
)

// room is how much a guest may write.
type room struct {
	mu   sync.Mutex
	left int64
}

// take accounts for so many bytes that are to be written. It fails if the host's disk has no room for
// them beside the reserve.
func (d *Dir) take(size int64) error {
	d.room.mu.Lock()
	defer d.room.mu.Unlock()
	if d.room.left -= size; d.room.left >= 0 {
		return nil
	}
	var fs unix.Statfs_t
	if err := dirfd.Retry(func() error { return unix.Fstatfs(d.root, &fs) }); err != nil {
		return err
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < reserve || uint64(size) > free-reserve {
		d.room.left = 0
		return unix.ENOSPC
	}
	d.room.left = lookInterval
	return nil
}
