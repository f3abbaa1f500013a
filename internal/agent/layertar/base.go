package layertar

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
	"github.com/smolvm/smolvm/internal/ocitar"
)

// Base is what is in the layers below the one that is written: only what differs from it is
// part of that. The root file system of a guest, which has no overlay, is compared with its
// image by it.
type Base struct {
	files map[string]Known
	// names are those of what is in each directory.
	names map[string][]string
}

// Known is what is known of a file in lower layers.
type Known struct {
	// Mode, UID and GID are as in stat(2).
	Mode, UID, GID uint32
	// Size is that of a regular file, in bytes.
	Size int64
	// ModTime is the time of the last change, in nanoseconds since 1970.
	ModTime int64
	// Device is that of a device's file, as in stat(2).
	Device uint64
	// Link is what a symbolic link leads to.
	Link string
}

// WriteKnown writes what is known of a file to a list, which [ReadBase] reads.
func WriteKnown(w io.Writer, name string, k Known) error {
	_, err := fmt.Fprintf(w, "%s\x00%d %d %d %d %d %d\x00%s\x00", name, k.Mode, k.UID, k.GID, k.Size, k.ModTime, k.Device, k.Link)
	return err
}

// ReadBase reads a list of the files in lower layers, each with its path from the root on. An
// empty one is nil: there are no lower layers.
func ReadBase(r io.Reader) (*Base, error) {
	base := &Base{files: map[string]Known{}, names: map[string][]string{}}
	in := bufio.NewReaderSize(r, 128<<10)
	for {
		name, err := in.ReadString(0)
		if errors.Is(err, io.EOF) && name == "" {
			break
		}
		var numbers, link string
		if err == nil {
			numbers, err = in.ReadString(0)
		}
		if err == nil {
			link, err = in.ReadString(0)
		}
		if err != nil {
			return nil, fmt.Errorf("read what is in lower layers: %w", err)
		}
		known := Known{Link: link[:len(link)-1]}
		if err := known.parse(numbers[:len(numbers)-1]); err != nil {
			return nil, fmt.Errorf("read what is in lower layers of %.300q: %w", name, err)
		}
		name = name[:len(name)-1]
		base.files[name] = known
		dir := path.Dir(name)
		base.names[dir] = append(base.names[dir], path.Base(name))
	}
	if len(base.files) == 0 {
		return nil, nil
	}
	return base, nil
}

// parse reads the numbers of a line of a list.
func (k *Known) parse(text string) error {
	var numbers [6]int64
	fields := strings.Fields(text)
	if len(fields) != len(numbers) {
		return errors.New("it has another number of fields")
	}
	for i, field := range fields {
		var err error
		if numbers[i], err = strconv.ParseInt(field, 10, 64); err != nil {
			return err
		}
	}
	k.Mode, k.UID, k.GID = uint32(numbers[0]), uint32(numbers[1]), uint32(numbers[2])
	k.Size, k.ModTime, k.Device = numbers[3], numbers[4], uint64(numbers[5])
	return nil
}

// has reports whether a file is in lower layers as it is now. A file that was ever changed
// since it was written to its image has another time of its last change of state than
// [Untouched], whatever its other times say. Of one that was moved with its directory that
// time stays: so all else is compared.
func (b *Base) has(dir int, name, path string, stat *unix.Stat_t) bool {
	known, ok := b.files[path]
	if !ok || stat.Ctim.Sec != Untouched || known.Mode != stat.Mode || known.UID != stat.Uid || known.GID != stat.Gid ||
		known.ModTime != unix.TimespecToNsec(stat.Mtim) {
		return false
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return known.Size == stat.Size
	case unix.S_IFCHR, unix.S_IFBLK:
		return known.Device == stat.Rdev
	case unix.S_IFLNK:
		link, err := dirfd.ReadLink(dir, name)
		return err == nil && link == known.Link
	}
	return true
}

// isDir reports whether lower layers have a directory of a path.
func (b *Base) isDir(path string) bool { return b.files[path].Mode&unix.S_IFMT == unix.S_IFDIR }

// Untouched is the time of the last change of state, in seconds since 1970, that files have in a
// root file system that was made of layers: none that a kernel sets.
const Untouched = 0

// missing returns what is in a directory in lower layers, and not there any more.
func (b *Base) missing(dir string, there []string) []string {
	if b == nil {
		return nil
	}
	var gone []string
	for _, name := range b.names[path.Clean(dir)] {
		if _, found := slices.BinarySearch(there, name); !found && !strings.HasPrefix(name, ocitar.Whiteout) {
			gone = append(gone, name)
		}
	}
	slices.Sort(gone)
	return gone
}
