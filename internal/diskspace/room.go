package diskspace

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// reserve is what writers of untrusted content leave of a file system, in bytes.
	reserve = 256 << 20
	// interval is how much may be written, in bytes, until the file system is looked at again.
	interval = 16 << 20
)

// Room bounds how much untrusted content is written to a file system: some of that is left to the
// host. The zero value is ready; several goroutines may use it.
type Room struct {
	mu   sync.Mutex
	left int64 // until the file system is looked at again
}

// Take accounts for so many bytes that are to be written to the file system of an open file. It fails
// with ENOSPC if they have no room beside what is left to the host, 256 MiB.
func (r *Room) Take(fd int, size int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.left -= size; r.left >= 0 {
		return nil
	}
	var fs unix.Statfs_t
	err := unix.Fstatfs(fd, &fs)
	for errors.Is(err, unix.EINTR) {
		err = unix.Fstatfs(fd, &fs)
	}
	if err != nil {
		return err
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < reserve || uint64(size) > free-reserve {
		r.left = 0
		return unix.ENOSPC
	}
	r.left = interval
	return nil
}
