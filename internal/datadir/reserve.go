package datadir

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/diskspace"
)

// The reserve is a file that takes room in the data directory, to be given up when its disk
// is full: VMs can still be listed, stopped and removed then, all of which takes a little
// room for the database. It is given up in parts, as guests may take what becomes free.

const (
	reserveName = ".reserve"
	reserveSize = 16 << 20
	reservePart = 512 << 10 // several times what a change of the database takes
	// enoughRoom is how much must be free on a disk to make the reserve there.
	enoughRoom = 2 * reserveSize
)

// KeepReserve makes the reserve, or makes it whole again, if there is room. That it can't be
// had is no failure of anything.
func (d *Dir) KeepReserve() {
	path := d.path(reserveName)
	if info, err := os.Stat(path); err == nil && info.Size() >= reserveSize {
		return
	}
	if free, _, err := diskspace.Of(d.root); err != nil || free < enoughRoom {
		return
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, fileMode)
	if err != nil {
		return
	}
	defer func() { _ = file.Close() }()
	err = unix.Fallocate(int(file.Fd()), 0, 0, reserveSize)
	if errors.Is(err, unix.EOPNOTSUPP) {
		_, _ = file.Write(make([]byte, reserveSize))
	}
}

// MakeRoom gives up a part of the reserve if the disk of the data directory is full, and
// reports whether it has.
func (d *Dir) MakeRoom() bool {
	if free, _, err := diskspace.Of(d.root); err != nil || free >= reservePart {
		return false // that is not what was missing
	}
	file, err := os.OpenFile(d.path(reserveName), os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	return err == nil && info.Size() > 0 && file.Truncate(max(info.Size()-reservePart, 0)) == nil
}
