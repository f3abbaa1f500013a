// Package disk makes and looks into disk files. It knows formats, and no VMs.
package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
)

// Formats of disk files.
const (
	Raw   = "raw"
	QCOW2 = "qcow2"
)

// ErrNoFileSystem says that a raw disk holds neither a file system nor a partition
// table that we know.
var ErrNoFileSystem = errors.New("holds no file system that is known (ext4, xfs, btrfs, squashfs, erofs, iso9660, vfat), and no partition table")

// Info is what a disk file says of itself.
type Info struct {
	// Format is [Raw] or [QCOW2].
	Format string
	// VirtualSize is the size of the disk that the guest sees, in bytes.
	VirtualSize int64
	// FileSystem on a raw disk, as in "ext4"; "partitions" for a partition table.
	FileSystem string
	// Backing is the path of the file that a qcow2 disk is an overlay of; empty if
	// it is none.
	Backing string
}

// Probe looks at a disk file. For a raw file in which it recognises nothing, the
// error matches [ErrNoFileSystem], and the rest of the information is right.
func Probe(path string) (Info, error) {
	file, err := os.Open(path)
	if err != nil {
		return Info{}, err
	}
	defer func() { _ = file.Close() }()
	stat, err := file.Stat()
	if err != nil {
		return Info{}, err
	}
	size := stat.Size()
	if mode := stat.Mode(); !mode.IsRegular() {
		if mode.Type() != fs.ModeDevice {
			return Info{}, &fs.PathError{Op: "use", Path: path, Err: errors.New("is not a disk image but a " + kindOf(mode))}
		}
		// A block device: its size is where its end is.
		if size, err = file.Seek(0, io.SeekEnd); err != nil {
			return Info{}, err
		}
	}
	info, err := probe(file, size)
	if err != nil {
		return info, fmt.Errorf("%s: %w", path, err)
	}
	return info, nil
}

func kindOf(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "directory"
	case mode&fs.ModeCharDevice != 0:
		return "character device"
	case mode&fs.ModeNamedPipe != 0:
		return "pipe"
	}
	return "socket"
}

// signature is the mark of a file system.
type signature struct {
	name   string
	offset int64
	mark   []byte
}

// signatures lists marks as the kernel's headers give them (include/uapi/linux/
// magic.h and the file systems' own).
func signatures() []signature {
	return []signature{
		{"ext4", 0x438, []byte{0x53, 0xef}},
		{"xfs", 0, []byte("XFSB")},
		{"btrfs", 0x10040, []byte("_BHRfS_M")},
		{"squashfs", 0, []byte("hsqs")},
		{"erofs", 1024, []byte{0xe2, 0xe1, 0xf5, 0xe0}},
		{"iso9660", 0x8001, []byte("CD001")},
		{"vfat", 0x52, []byte("FAT32")},
		{"vfat", 0x36, []byte("FAT1")},
	}
}

func probe(r io.ReaderAt, size int64) (Info, error) {
	header := make([]byte, 512) // for qcow2's and for a partition table
	n, err := r.ReadAt(header, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Info{}, err
	}
	if bytes.HasPrefix(header, []byte(qcow2Magic)) {
		return probeQCOW2(r, header[:n])
	}
	info := Info{Format: Raw, VirtualSize: size}
	for _, s := range signatures() {
		found := make([]byte, len(s.mark))
		if _, err := r.ReadAt(found, s.offset); err == nil && bytes.Equal(found, s.mark) {
			info.FileSystem = s.name
			return info, nil
		}
	}
	if isPartitioned(header) {
		info.FileSystem = "partitions"
		return info, nil
	}
	return info, ErrNoFileSystem
}

// isPartitioned says whether a disk begins with a partition table: an MBR, which a GPT
// has too. Its mark alone is not enough, as every bootable sector has it, a kernel's too.
func isPartitioned(sector []byte) bool {
	const table, entrySize, markAt = 446, 16, 510
	if !bytes.HasPrefix(sector[markAt:], []byte{0x55, 0xaa}) {
		return false
	}
	used := false
	for entry := range slices.Chunk(sector[table:markAt], entrySize) {
		status, kind := entry[0], entry[4]
		if status != 0 && status != 0x80 { // neither inactive nor active
			return false
		}
		used = used || kind != 0
	}
	return used
}

// maxBackingName is the longest name of a backing file (QEMU's docs/interop/qcow2).
const maxBackingName = 1023

func probeQCOW2(r io.ReaderAt, header []byte) (Info, error) {
	if len(header) < qcow2HeaderV2Size {
		return Info{}, errors.New("is a qcow2 disk that ends within its header")
	}
	version := binary.BigEndian.Uint32(header[4:])
	size := binary.BigEndian.Uint64(header[24:])
	if version != 2 && version != 3 {
		return Info{}, fmt.Errorf("is a qcow2 disk of version %d; 2 and 3 are known", version)
	}
	if size > 1<<62 {
		return Info{}, fmt.Errorf("is a qcow2 disk with an impossible size of %d bytes", size)
	}
	info := Info{Format: QCOW2, VirtualSize: int64(size)}
	offset, length := binary.BigEndian.Uint64(header[8:]), binary.BigEndian.Uint32(header[16:])
	if offset == 0 {
		return info, nil
	}
	if length > maxBackingName || offset > 1<<30 {
		return Info{}, errors.New("is a qcow2 disk with an impossible backing file")
	}
	name := make([]byte, length)
	if _, err := r.ReadAt(name, int64(offset)); err != nil {
		return Info{}, fmt.Errorf("is a qcow2 disk that ends within the name of its backing file: %w", err)
	}
	info.Backing = string(name)
	return info, nil
}
