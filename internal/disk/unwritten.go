package disk

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
)

// IsUnwritten reports whether nothing was written to a disk of ours yet: whether an overlay is
// just what its base is, or a raw disk, of which nobody can tell that, is not there yet.
func IsUnwritten(path string) bool {
	if FormatOf(path) == Raw {
		_, err := os.Lstat(path)
		return errors.Is(err, fs.ErrNotExist)
	}
	file, err := os.Open(path)
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }()
	h, err := readHeader(file)
	if err != nil || h.backingOffset == 0 || h.snapshots != 0 || h.l1Entries > maxOverlay/clusterSize/(clusterSize/8) || h.l1Offset > maxOverlay {
		return false
	}
	// A disk has clusters of its own only if an entry of this table says where.
	table := make([]byte, 8*int(h.l1Entries))
	if _, err := file.ReadAt(table, int64(h.l1Offset)); err != nil {
		return false
	}
	return len(bytes.TrimLeft(table, "\x00")) == 0
}
