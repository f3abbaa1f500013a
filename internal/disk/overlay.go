package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/flock"
)

// Overlay is a disk to be made over another one.
type Overlay struct {
	// Path is the path of the new disk.
	Path string
	// Base is the file that it is based on, which must not change from then on, and
	// BaseFormat its format.
	Base, BaseFormat string
	// BaseName is the name by which the new disk's header has its base. Empty: Base's
	// absolute path.
	BaseName string
	// Size is that of the new disk, in bytes. Zero: the base's. It can't be smaller.
	Size int64
	// Replace has the new disk replace a file at Path, if there is one, in one step.
	Replace bool
	// Sync writes the disk, and its name, to stable storage before CreateOverlay returns.
	Sync bool
}

// CreateOverlay makes a qcow2 disk that holds only what differs from its base. An overlay
// without data is a header, a table of refcounts, and an empty table of clusters; all of
// that is written here, as starting qemu-img would take longer than the rest of creating
// a VM. It takes the same short time whatever the size. If it fails, nothing is left.
func CreateOverlay(ctx context.Context, o Overlay) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	base, err := filepath.Abs(o.Base)
	if err != nil {
		return err
	}
	info, err := Inspect(base, o.BaseFormat)
	if err != nil && !errors.Is(err, ErrNoFileSystem) {
		return fmt.Errorf("make disk: %w", err)
	}
	name := o.BaseName
	if name == "" {
		name = base
	}
	switch {
	case o.Size == 0:
		o.Size = info.VirtualSize
	case o.Size < info.VirtualSize:
		return fmt.Errorf("make disk %s: %d bytes are fewer than the %d of its base %s", o.Path, o.Size, info.VirtualSize, base)
	}
	if len(name) > maxBackingName {
		return fmt.Errorf("make disk %s: the path of its base has %d bytes; at most %d are allowed", o.Path, len(name), maxBackingName)
	}
	if o.Size > maxOverlay {
		return fmt.Errorf("make disk %s: %d bytes are more than the %d that a disk can have", o.Path, o.Size, int64(maxOverlay))
	}
	image := emptyOverlay(name, o.BaseFormat, roundUp(o.Size, 512))
	err = writeFile(o.Path, publisher(o.Replace), func(out *os.File) error {
		if _, err := out.Write(image); err != nil || !o.Sync {
			return err
		}
		return out.Sync()
	})
	if err == nil && o.Sync {
		err = durable.Sync(filepath.Dir(o.Path))
	}
	if err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	return nil
}

// emptyOverlay returns the whole file of an overlay without data. Its clusters: the header;
// the refcount table; one refcount block; the L1 table, which may take several.
func emptyOverlay(base, baseFormat string, size int64) []byte {
	l1Entries := (size + perL1Entry - 1) / perL1Entry
	l1Clusters := (l1Entries*8 + clusterSize - 1) / clusterSize
	clusters := 3 + l1Clusters
	image := make([]byte, clusters*clusterSize)
	be := binary.BigEndian

	header := image[:clusterSize]
	copy(header, qcow2Magic)
	be.PutUint32(header[4:], 3)
	be.PutUint32(header[20:], clusterBits)
	be.PutUint64(header[24:], uint64(size))
	be.PutUint32(header[36:], uint32(l1Entries))
	be.PutUint64(header[40:], 3*clusterSize) // L1 table
	be.PutUint64(header[48:], 1*clusterSize) // refcount table
	be.PutUint32(header[56:], 1)             // of one cluster
	be.PutUint32(header[96:], refcountOrder)
	be.PutUint32(header[100:], qcow2HeaderSize)
	at := qcow2HeaderSize
	be.PutUint32(header[at:], extensionBackingFormat)
	be.PutUint32(header[at+4:], uint32(len(baseFormat)))
	copy(header[at+8:], baseFormat)
	// Padded to 8 bytes, then the end of the extensions, which is all zero.
	at += 8 + int(roundUp(int64(len(baseFormat)), 8)) + 8
	be.PutUint64(header[8:], uint64(at))
	be.PutUint32(header[16:], uint32(len(base)))
	copy(header[at:], base)

	be.PutUint64(image[1*clusterSize:], 2*clusterSize)
	for i := range clusters {
		be.PutUint16(image[2*clusterSize+2*i:], 1)
	}
	return image
}

// newSuffix ends the name that a file has for the moment before it replaces another.
const newSuffix = ".new"

// RemoveLeftovers removes what a process that was killed while it replaced a disk, or gave it to
// the VM that claimed it, has left.
func RemoveLeftovers(path string) error {
	return errors.Join(removeIfThere(path+newSuffix), removeIfThere(path+ClaimedSuffix))
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// publisher returns how a file gets its name: by a link, which unlike a rename never replaces
// what is there, or in the place of another.
func publisher(replaces bool) func(temp, path string) error {
	if replaces {
		return replace
	}
	return link
}

// replace gives a file the name of another, which it takes the place of.
func replace(temp, path string) error {
	if err := errors.Join(removeIfThere(path+newSuffix), link(temp, path+newSuffix)); err != nil {
		return err
	}
	return os.Rename(path+newSuffix, path)
}

// writeFile writes a file that gets its name from publish when it is complete, so that it
// is either whole or not there at all. Until then it has no name, where the file system
// knows such files.
func writeFile(path string, publish func(temp, path string) error, fill func(*os.File) error) (err error) {
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		file := os.NewFile(uintptr(fd), path)
		defer func() { err = errors.Join(err, file.Close()) }()
		if err := fill(file); err != nil {
			return err
		}
		return publish(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), path)
	}
	temp, err := createTemp(dir)
	if err != nil {
		return err
	}
	// The lock ends with the file.
	defer func() { err = errors.Join(err, os.Remove(temp.Name()), temp.Close()) }()
	if err := fill(temp); err != nil {
		return err
	}
	return publish(temp.Name(), path)
}

// createTemp makes a file whose name says that it is not complete, and locks it for as long as
// somebody is at it.
func createTemp(dir string) (*os.File, error) {
	for {
		temp, err := os.CreateTemp(dir, TempPrefix+"*") // mode 0600
		if err != nil {
			return nil, err
		}
		// Before it was locked it may have been taken for a file that was left. Where files
		// can't be locked none is.
		if !errors.Is(flock.TryLock(temp), flock.ErrLocked) && isNamed(temp) {
			return temp, nil
		}
		_ = temp.Close()
	}
}

// isNamed reports whether a file still has the name by which it was opened.
func isNamed(file *os.File) bool {
	here, err := file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(file.Name())
	return err == nil && os.SameFile(here, there)
}

// RemoveIncomplete removes the files of a directory that killed processes have not completed.
func RemoveIncomplete(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), TempPrefix) || !entry.Type().IsRegular() {
			continue
		}
		file, err := os.Open(filepath.Join(dir, entry.Name()))
		if err != nil {
			continue // it was completed since
		}
		if flock.TryLock(file) == nil {
			if err := os.Remove(file.Name()); !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		_ = file.Close()
	}
	return errors.Join(errs...)
}

// link gives a file a name that is not taken. Unlike [os.Link] it follows a link to it.
func link(temp, path string) error {
	if err := unix.Linkat(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.LinkError{Op: "link", Old: temp, New: path, Err: err}
	}
	return nil
}

// TempPrefix begins the names of files that are not complete yet.
const TempPrefix = ".disk-"
