package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// Grow makes an overlay of ours larger. Nobody may have it open. Sizes are in
// bytes. What it holds stays, and the new part reads as zeros.
func Grow(path string, size int64) (err error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("grow disk: %w", err)
	}
	defer func() {
		if err = errors.Join(err, file.Close()); err != nil {
			err = fmt.Errorf("grow disk %s: %w", path, err)
		}
	}()
	h, err := readHeader(file)
	if err != nil {
		return err
	}
	size = roundUp(size, 512)
	switch {
	case size < int64(h.size):
		return fmt.Errorf("%d bytes are fewer than the %d that it has; a disk can't be made smaller", size, h.size)
	case h.features != 0 || h.snapshots != 0 || h.clusterBits != clusterBits:
		return errors.New("it is none of those that smolvm makes")
	}
	// The table whose entries each stand for perL1Entry bytes takes whole clusters, so
	// there is room for more entries: one cluster's are enough for 4 TiB.
	entries := (size + perL1Entry - 1) / perL1Entry
	used, room := int64(h.l1Entries)*8, roundUp(int64(h.l1Entries)*8, clusterSize)
	if entries*8 > room {
		return fmt.Errorf("%d bytes are more than the %d that this disk can grow to", size, room/8*perL1Entry)
	}
	spare := make([]byte, room-used)
	if _, err := file.ReadAt(spare, int64(h.l1Offset)+used); err != nil {
		return err
	}
	if len(bytes.TrimLeft(spare, "\x00")) > 0 {
		return errors.New("it is none of those that smolvm makes")
	}
	// Both fields at once: size, encryption (none), entries.
	fields := make([]byte, 16)
	binary.BigEndian.PutUint64(fields, uint64(size))
	binary.BigEndian.PutUint32(fields[12:], uint32(entries))
	if _, err := file.WriteAt(fields, 24); err != nil {
		return err
	}
	return file.Sync()
}
