package disk

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
)

// Pristine says whether a qcow2 overlay holds nothing of its own yet: whether it is just
// what its base is.
func Pristine(path string) bool {
	file, err := os.Open(path)
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }()
	header := make([]byte, qcow2HeaderSize)
	if _, err := io.ReadFull(file, header); err != nil || string(header[:4]) != qcow2Magic {
		return false
	}
	be := binary.BigEndian
	entries, at, snapshots := be.Uint32(header[36:]), be.Uint64(header[40:]), be.Uint32(header[60:])
	if be.Uint64(header[8:]) == 0 || snapshots != 0 || entries > maxOverlay/clusterSize/(clusterSize/8) || at > maxOverlay {
		return false
	}
	// A disk has clusters of its own only if an entry of this table says where.
	table := make([]byte, 8*int(entries))
	if _, err := file.ReadAt(table, int64(at)); err != nil {
		return false
	}
	return len(bytes.TrimLeft(table, "\x00")) == 0
}
