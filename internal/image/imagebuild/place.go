package imagebuild

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
	"github.com/smolvm/smolvm/internal/ocitar"
)

// dirMode is the mode of directories that are made for what is copied.
const dirMode = unix.S_IFDIR | 0o755

// newLayer is a layer in the making, over the files that are there. It is a [files.Tree] of all
// of them together.
type newLayer struct {
	below files.Tree
	// added are its files by name.
	added map[string]placed
	// owner and time are those of directories that are made.
	owner owner
	time  time.Time
}

// placed is a file of a layer.
type placed struct {
	file files.File
	open func() (io.ReadCloser, error)
	sum  []byte // nil: not known
}

func newLayerOver(below files.Tree, made owner, at time.Time) *newLayer {
	return &newLayer{below: below, added: map[string]placed{}, owner: made, time: at}
}

// Lstat tells of a file.
func (l *newLayer) Lstat(name string) (files.File, error) {
	if added, ok := l.added[name]; ok {
		return added.file, nil
	}
	return l.below.Lstat(name)
}

// Names is there to make it a tree: nothing is looked for in it.
func (l *newLayer) Names(name string) ([]string, error) { return l.below.Names(name) }

// Open is there to make it a tree.
func (l *newLayer) Open(name string) (io.ReadCloser, error) { return l.below.Open(name) }

// resolve follows a path. A missing one has the name that it would have.
func (l *newLayer) resolve(name string) (string, files.File, bool, error) {
	actual, file, err := files.Resolve(l, name)
	if errors.Is(err, fs.ErrNotExist) {
		return actual, file, false, nil
	}
	if errors.Is(err, unix.ENOTDIR) {
		err = fmt.Errorf("%q in the image: a part of the path is no directory", path.Clean("/"+name))
	}
	return actual, file, err == nil, err
}

// makeDirs makes a directory with those above it, as far as they are missing. No part of the name is
// a link.
func (l *newLayer) makeDirs(name string) error {
	if name == "" || name == "." {
		return nil
	}
	file, err := l.Lstat(name)
	switch {
	case err == nil && file.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("%q in the image is no directory", "/"+name)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := l.makeDirs(path.Dir(name)); err != nil {
		return err
	}
	l.added[name] = placed{file: files.File{Mode: dirMode, UID: l.owner.uid, GID: l.owner.gid, ModTime: l.time}}
	return nil
}

// put puts a file in its place. No part of the name is a link, and its directory is there.
func (l *newLayer) put(name string, file files.File, from item) error {
	if base := path.Base(name); strings.HasPrefix(base, ocitar.Whiteout) {
		return fmt.Errorf("%q can't be in an image: a name that begins with .wh. hides another", "/"+name)
	}
	there, err := l.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case file.IsDir() && !there.IsDir():
		return fmt.Errorf("a directory can't be copied over %q in the image, which is none", "/"+name)
	case !file.IsDir() && there.IsDir():
		return fmt.Errorf("a file can't be copied over %q in the image, which is a directory", "/"+name)
	}
	l.added[name] = placed{file, from.open, from.sum}
	return nil
}

// change says how files are changed that are copied.
type change struct {
	owner *owner
	mode  func(mode uint32) uint32 // nil: as it is
	time  func(time.Time) time.Time
}

func (c change) apply(file files.File) files.File {
	if c.owner != nil {
		file.UID, file.GID = c.owner.uid, c.owner.gid
		file.ID = nil // its other names may be somebody else's
	}
	if c.mode != nil && file.Type() != unix.S_IFLNK {
		file.Mode = c.mode(file.Mode)
		file.ID = nil
	}
	file.ModTime = c.time(file.ModTime)
	return file
}

// copySelection copies one source to a destination: a file to a directory that is there, or that
// ends with a slash, and else to that name; and what is in a directory to a directory.
func (l *newLayer) copySelection(one selection, dest string, how change) error {
	actual, there, exists, err := l.resolve(dest)
	if err != nil {
		return err
	}
	source := one.items[0].file
	toDir := strings.HasSuffix(dest, "/") || exists && there.IsDir()
	if !source.IsDir() {
		dir := path.Dir(actual)
		if toDir {
			dir, actual = actual, path.Join(actual, one.base)
		}
		if dir == "." {
			dir = ""
		}
		if err := l.makeDirs(dir); err != nil {
			return err
		}
		return l.put(actual, how.apply(source), one.items[0])
	}
	return l.copyDir(one.items, actual, how)
}

// copyDir copies what is in a directory. That which it is copied to keeps its owner and mode, and
// those in it that are there already get the source's.
func (l *newLayer) copyDir(items []item, dest string, how change) error {
	if err := l.makeDirs(dest); err != nil {
		return err
	}
	for _, item := range items[1:] {
		if err := l.put(path.Join(dest, item.name), how.apply(item.file), item); err != nil {
			return err
		}
	}
	return nil
}

// write writes the archive of the layer: equal layers are equal archives.
func (l *newLayer) write(ctx context.Context, w io.Writer) error {
	archive := tar.NewWriter(w)
	linked := map[any]string{}
	for _, name := range slices.SortedFunc(maps.Keys(l.added), func(a, b string) int {
		// So that what is in a directory follows it, whatever bytes its name has.
		return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
	}) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		one := l.added[name]
		if first, ok := linked[one.file.ID]; ok && one.file.ID != nil && !one.file.IsDir() {
			one.file.Link = first
			header := headerOf(name, one.file)
			header.Typeflag, header.Size = tar.TypeLink, 0
			if err := archive.WriteHeader(header); err != nil {
				return err
			}
			continue
		}
		if one.file.ID != nil {
			linked[one.file.ID] = name
		}
		if err := writeFile(archive, name, one); err != nil {
			return fmt.Errorf("%q: %w", "/"+name, err)
		}
	}
	return archive.Close()
}

func writeFile(archive *tar.Writer, name string, one placed) error {
	if !one.file.IsRegular() {
		return archive.WriteHeader(headerOf(name, one.file))
	}
	content, err := one.open()
	if err != nil {
		return err
	}
	defer func() { _ = content.Close() }()
	if err := archive.WriteHeader(headerOf(name, one.file)); err != nil {
		return err
	}
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(archive, sum), io.LimitReader(content, one.file.Size))
	if err == nil && (n != one.file.Size || one.sum != nil && !bytes.Equal(sum.Sum(nil), one.sum)) {
		err = errors.New("it has changed while it was copied")
	}
	return err
}

// headerOf returns what an archive says of a file.
func headerOf(name string, file files.File) *tar.Header {
	header := &tar.Header{Name: name, Mode: int64(file.Mode & 0o7777), Uid: int(file.UID), Gid: int(file.GID), ModTime: file.ModTime, Linkname: file.Link}
	switch file.Type() {
	case unix.S_IFDIR:
		header.Typeflag, header.Name = tar.TypeDir, name+"/"
	case unix.S_IFLNK:
		header.Typeflag = tar.TypeSymlink
	case unix.S_IFIFO:
		header.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		header.Typeflag = tar.TypeChar
		if file.Type() == unix.S_IFBLK {
			header.Typeflag = tar.TypeBlock
		}
		header.Devmajor, header.Devminor = int64(unix.Major(file.Device)), int64(unix.Minor(file.Device))
	default:
		header.Typeflag, header.Size = tar.TypeReg, file.Size
	}
	for attribute, value := range file.Xattrs {
		if header.PAXRecords == nil {
			header.PAXRecords = map[string]string{}
		}
		header.PAXRecords["SCHILY.xattr."+attribute] = string(value)
	}
	return header
}

// inMemory returns what opens some content.
func inMemory(content []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }
}
