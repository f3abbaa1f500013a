package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// Grow makes a disk of ours larger, which is a raw file or a qcow2 overlay. Nobody may have it
// open. Sizes are in bytes. What it holds stays, and the new part reads as zeros.
func Grow(path, format string, size int64) (err error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("grow disk: %w", err)
	}
	defer func() {
		if err = errors.Join(err, file.Close()); err != nil {
			err = fmt.Errorf("grow disk %s: %w", path, err)
		}
	}()
	size = roundUp(size, 512)
	if format == Raw {
		return growRaw(file, size)
	}
	return growOverlay(file, size)
}

func growRaw(file *os.File, size int64) error {
	info, err := file.Stat()
	if err == nil {
		err = checkGrowth(info.Size(), size)
	}
	if err == nil {
		err = file.Truncate(size)
	}
	if err != nil {
		return err
	}
	return file.Sync()
}

func checkGrowth(was, size int64) error {
	if size < was {
		return fmt.Errorf("%d bytes are fewer than the %d that it has; a disk can't be made smaller", size, was)
	}
	return nil
}

func growOverlay(file *os.File, size int64) error {
	h, err := readHeader(file)
	if err == nil {
		err = checkGrowth(int64(h.size), size)
	}
	switch {
	case err != nil:
		return err
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
