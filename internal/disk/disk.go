// Package disk makes and looks into disk files. It knows formats, and no VMs.
//
// A disk's format is declared, and never guessed from the disk's content: a guest may write
// anything into its raw disk, also the header of another format that names a file of the host
// as its base.
package disk

import (
	"bytes"
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

var (
	// ErrNoFileSystem reports that a raw disk holds neither a file system nor a partition
	// table that we know.
	ErrNoFileSystem = errors.New("holds no file system that is known (ext4, xfs, btrfs, squashfs, erofs, iso9660, vfat), and no partition table")
	// ErrUndeclared reports that a format must be declared.
	ErrUndeclared = errors.New("looks like qcow2; say format qcow2 if it is, or format raw if that is what a guest has written into it")
)

// Info is what a disk file's header, or its beginning, says of it.
type Info struct {
	// Format is [Raw] or [QCOW2].
	Format string
	// VirtualSize is the size of the disk that the guest sees, in bytes.
	VirtualSize int64
	// FileSystem on a raw disk, as in "ext4"; "partitions" for a partition table.
	FileSystem string
	// Backing is the name of the file that a qcow2 disk is an overlay of, as its header
	// has it, and BackingFormat that file's format; empty if it is none.
	Backing, BackingFormat string
	// Device reports whether the file is a block device.
	Device bool
}

// File is one file of the chain that makes a disk, as it is declared.
type File struct {
	Path, Format string
	// Device reports whether the file is a block device.
	Device bool
}

// Inspect looks at a disk file of a format. For a raw file in which it recognises
// nothing, the error matches [ErrNoFileSystem], and the rest of the information is right.
func Inspect(path, format string) (Info, error) {
	return inspect(path, func(file io.ReaderAt, info Info) (Info, error) { return info.read(file, format) })
}

// Declare looks at a disk file that somebody brings, and whose format is as they
// declared. Empty: raw, unless it looks like qcow2, which is refused with
// [ErrUndeclared]. So is a qcow2 disk that would make a VMM open files that nobody has
// named. Otherwise it is as [Inspect].
func Declare(path, format string) (Info, error) { return declare(path, format, false) }

// MaxChain bounds how many files a disk is based on: each is one that the VMM has open.
const MaxChain = 32

// DeclareChain is [Declare] of a disk that is based on other files, which are declared as
// well, the nearest first. Their names and formats are those given here, whatever is in
// headers; but whether a file is based on another must be as its header says, so that none is
// forgotten. What is returned of them has Device filled in.
func DeclareChain(top File, backing []File) (Info, []File, error) {
	if len(backing) > MaxChain {
		return Info{}, nil, fmt.Errorf("%s: it is based on %d files; at most %d are allowed", top.Path, len(backing), MaxChain)
	}
	info, err := declare(top.Path, top.Format, len(backing) > 0)
	if err != nil && !errors.Is(err, ErrNoFileSystem) {
		return info, nil, err
	}
	topErr := err
	chain := slices.Clone(backing)
	for n := range chain {
		file := &chain[n]
		if file.Format == "" {
			return info, nil, fmt.Errorf("%s: its format must be named; use %s or %s", file.Path, Raw, QCOW2)
		}
		found, err := declare(file.Path, file.Format, n < len(chain)-1)
		if err != nil && !errors.Is(err, ErrNoFileSystem) {
			return info, nil, err
		}
		file.Device = found.Device
	}
	if err := checkLoop(append([]File{top}, chain...)); err != nil {
		return info, nil, err
	}
	return info, chain, topErr
}

// checkLoop refuses a chain with a file that comes twice, by whatever names.
func checkLoop(chain []File) error {
	var seen []fs.FileInfo
	for _, file := range chain {
		info, err := os.Stat(file.Path)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(seen, func(other fs.FileInfo) bool { return os.SameFile(info, other) }) {
			return fmt.Errorf("%s: it is based on itself", file.Path)
		}
		seen = append(seen, info)
	}
	return nil
}

// declare is Declare; based reports whether the user has named a file that the disk is based
// on.
func declare(path, format string, based bool) (Info, error) {
	return inspect(path, func(file io.ReaderAt, info Info) (Info, error) {
		switch format {
		case "":
			mark := make([]byte, len(qcow2Magic))
			if n, _ := file.ReadAt(mark, 0); string(mark[:n]) == qcow2Magic {
				return info, ErrUndeclared
			}
			format = Raw
		case QCOW2:
			h, err := readHeader(file)
			if err == nil {
				err = h.foreign(based)
			}
			if err != nil {
				return info, err
			}
		}
		if format == Raw && based {
			return info, errors.New("is raw, and so not based on the file that was named; say format qcow2 if it is")
		}
		return info.read(file, format)
	})
}

// Probe is [Inspect] of a file whose format is guessed from what it holds. It is for
// files that no guest can have written, and for messages.
func Probe(path string) (Info, error) {
	return inspect(path, func(file io.ReaderAt, info Info) (Info, error) {
		mark := make([]byte, len(qcow2Magic))
		if n, _ := file.ReadAt(mark, 0); string(mark[:n]) == qcow2Magic {
			return info.read(file, QCOW2)
		}
		return info.read(file, Raw)
	})
}

func inspect(path string, look func(file io.ReaderAt, info Info) (Info, error)) (Info, error) {
	file, err := os.Open(path)
	if err != nil {
		return Info{}, err
	}
	defer func() { _ = file.Close() }()
	stat, err := file.Stat()
	if err != nil {
		return Info{}, err
	}
	info := Info{VirtualSize: stat.Size()}
	if mode := stat.Mode(); !mode.IsRegular() {
		if mode.Type() != fs.ModeDevice {
			return Info{}, &fs.PathError{Op: "use", Path: path, Err: errors.New("is not a disk image but a " + kindOf(mode))}
		}
		// A block device: its size is where its end is.
		info.Device = true
		if info.VirtualSize, err = file.Seek(0, io.SeekEnd); err != nil {
			return Info{}, err
		}
	}
	if info, err = look(file, info); err != nil {
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

// read completes what is known of a file from what it holds.
func (i Info) read(r io.ReaderAt, format string) (Info, error) {
	switch format {
	case Raw:
		i.Format = Raw
		var err error
		i.FileSystem, err = fileSystemOf(r)
		return i, err
	case QCOW2:
		h, err := readHeader(r)
		if err != nil {
			return Info{}, err
		}
		i.Format, i.VirtualSize, i.Backing, i.BackingFormat = QCOW2, int64(h.size), h.backing, h.backingFormat
		return i, nil
	}
	return Info{}, fmt.Errorf("format %q is not known; use %s or %s", format, Raw, QCOW2)
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

// fileSystemOf returns the name of the file system on a raw disk.
func fileSystemOf(r io.ReaderAt) (string, error) {
	for _, s := range signatures() {
		found := make([]byte, len(s.mark))
		if _, err := r.ReadAt(found, s.offset); err == nil && bytes.Equal(found, s.mark) {
			return s.name, nil
		}
	}
	sector := make([]byte, 512) // has a partition table
	if _, err := r.ReadAt(sector, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if isPartitioned(sector) {
		return "partitions", nil
	}
	return "", ErrNoFileSystem
}

// isPartitioned reports whether a disk begins with a partition table: an MBR, which a GPT
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
