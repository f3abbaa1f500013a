package layertar

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
	"github.com/smolvm/smolvm/internal/ocitar"
)

// The extended attributes by which an overlay file system marks a directory that hides all
// below it, and files that stand for a whiteout where there may be no devices. Overlays of
// users without privileges have the others.
var (
	opaqueMarks   = []string{"trusted.overlay.opaque", "user.overlay.opaque"}
	whiteoutMarks = []string{"trusted.overlay.whiteout", "user.overlay.whiteout"}
)

// Options say what [Write] writes.
type Options struct {
	// Upper says that the directory is the upper one of an overlay file system.
	Upper bool
	// Base is what lower layers have; nil: there are none, or Upper says what differs.
	Base *Base
	// Replace returns another content for a file, by its path and by what it holds; nil if it
	// has none. Only files of at most [MaxReplaced] bytes are asked for. It may be nil.
	Replace func(path string, read func() ([]byte, error)) ([]byte, error)
	// Skip reports what is left out of a path, which has no slash at its ends. It may be nil.
	Skip func(path string) Skip
}

// Skip is what is left out of a file.
type Skip int

// What may be left out.
const (
	Nothing Skip = iota
	Content      // of a directory: it is written as if it were empty
	Whole        // there is no entry of it
)

// writer writes the archive of a directory.
type writer struct {
	ctx  context.Context
	tar  *tar.Writer
	opts Options
	// links are the paths of files that have several names, by their numbers.
	links map[uint64]string
	dev   uint64
	buf   []byte
}

// Write writes the archive of what is in a directory, without the directory itself, in the
// order of names. What other file systems are mounted in it is left out. Sockets are too, as
// no archive has them. The error names the file that can't be in a layer, or be read.
func Write(ctx context.Context, w io.Writer, dir string, opts Options) error {
	root, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	var stat unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &stat); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	out := &writer{ctx: ctx, tar: tar.NewWriter(w), opts: opts, links: map[uint64]string{}, dev: stat.Dev, buf: make([]byte, 128<<10)}
	if err := out.dir(root, ""); err != nil {
		return err
	}
	return out.tar.Close()
}

// dir writes what is in a directory, whose path is empty or ends in a slash.
func (w *writer) dir(dir *os.File, path string) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		if err := w.child(dir, path+name, name); err != nil {
			return err
		}
	}
	for _, name := range w.opts.Base.missing(path, names) {
		if w.skip(path+name) == Whole {
			continue
		}
		if err := w.whiteout(path + ocitar.Whiteout + name); err != nil {
			return err
		}
	}
	return nil
}

// skip returns what is left out of a file.
func (w *writer) skip(path string) Skip {
	if w.opts.Skip == nil {
		return Nothing
	}
	return w.opts.Skip(path)
}

// child writes what a directory has under a name.
func (w *writer) child(dir *os.File, path, name string) error {
	skip := w.skip(path)
	if skip == Whole {
		return nil
	}
	fd := int(dir.Fd())
	stat, err := dirfd.Lstat(fd, name)
	if errors.Is(err, unix.ENOENT) {
		return nil // it was removed since
	}
	if err == nil && w.isMounted(path, &stat) {
		return nil
	}
	if err == nil {
		err = w.entry(fd, path, name, &stat, skip)
	}
	var already *fileError
	if err == nil || errors.As(err, &already) || w.ctx.Err() != nil {
		return err
	}
	return &fileError{path, err}
}

// isMounted reports whether something is mounted on a file that is not to be seen: what is
// there is another file, with another owner and mode. A directory that lower layers don't have is
// written all the same, without what is in it, as it may be needed.
func (w *writer) isMounted(path string, stat *unix.Stat_t) bool {
	if stat.Dev == w.dev {
		return false
	}
	return stat.Mode&unix.S_IFMT != unix.S_IFDIR || w.opts.Base != nil && w.opts.Base.isDir(path)
}

// fileError is the error of one file.
type fileError struct {
	path string
	err  error
}

func (e *fileError) Error() string { return fmt.Sprintf("%.300q: %s", "/"+e.path, e.err) }
func (e *fileError) Unwrap() error { return e.err }

func (w *writer) entry(dir int, path, name string, stat *unix.Stat_t, skip Skip) error {
	hidden, err := w.isWhiteout(dir, name, stat)
	if err != nil {
		return err
	}
	if hidden {
		return w.whiteout(path[:len(path)-len(name)] + ocitar.Whiteout + name)
	}
	if strings.HasPrefix(name, ocitar.Whiteout) {
		return fmt.Errorf("an image can't hold a file whose name begins with %s: there it would hide another; remove or rename it", ocitar.Whiteout)
	}
	header, err := w.header(dir, path, name, stat)
	if header == nil || err != nil {
		return err
	}
	same := w.opts.Base != nil && w.opts.Base.has(dir, name, path, stat)
	if stat.Mode&unix.S_IFMT == unix.S_IFDIR {
		return w.subdir(dir, name, header, stat, skip, same)
	}
	if same {
		return nil
	}
	if header.Typeflag != tar.TypeReg {
		return w.tar.WriteHeader(header)
	}
	return w.file(dir, path, name, header)
}

// isWhiteout reports whether an overlay has a file to hide one of a lower layer.
func (w *writer) isWhiteout(dir int, name string, stat *unix.Stat_t) (bool, error) {
	switch kind := stat.Mode & unix.S_IFMT; {
	case !w.opts.Upper:
		return false, nil
	case kind == unix.S_IFCHR:
		return stat.Rdev == 0, nil
	case kind != unix.S_IFREG || stat.Size != 0:
		return false, nil
	}
	return hasAny(dir, name, whiteoutMarks)
}

func hasAny(dir int, name string, attributes []string) (bool, error) {
	for _, attribute := range attributes {
		value, found, err := getXattr(dir, name, attribute)
		if err != nil || found && value != "n" {
			return err == nil, err
		}
	}
	return false, nil
}

// whiteout writes an entry that stands for what is not there.
func (w *writer) whiteout(path string) error {
	return w.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o644, ModTime: time.Unix(0, 0)})
}

// header returns the header of a file; nil if archives have none of its kind.
func (w *writer) header(dir int, path, name string, stat *unix.Stat_t) (*tar.Header, error) {
	header := &tar.Header{
		Name: path, Mode: int64(stat.Mode & 0o7777), Uid: int(stat.Uid), Gid: int(stat.Gid),
		ModTime: time.Unix(stat.Mtim.Sec, 0),
	}
	kind := stat.Mode & unix.S_IFMT
	switch kind {
	case unix.S_IFREG:
		header.Typeflag, header.Size = tar.TypeReg, stat.Size
	case unix.S_IFDIR:
		header.Typeflag, header.Name = tar.TypeDir, path+"/"
	case unix.S_IFLNK:
		target, err := dirfd.ReadLink(dir, name)
		if err != nil {
			return nil, err
		}
		header.Typeflag, header.Linkname, header.Mode = tar.TypeSymlink, target, 0o777
	case unix.S_IFIFO:
		header.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		header.Typeflag = tar.TypeChar
		if kind == unix.S_IFBLK {
			header.Typeflag = tar.TypeBlock
		}
		header.Devmajor, header.Devminor = int64(unix.Major(stat.Rdev)), int64(unix.Minor(stat.Rdev))
	default:
		return nil, nil
	}
	if kind != unix.S_IFDIR && stat.Nlink > 1 {
		if first, seen := w.links[stat.Ino]; seen {
			return &tar.Header{Typeflag: tar.TypeLink, Name: path, Linkname: first, Mode: header.Mode, Uid: header.Uid, Gid: header.Gid, ModTime: header.ModTime}, nil
		}
		w.links[stat.Ino] = path
	}
	return header, addXattrs(header, dir, name)
}

// addXattrs adds the extended attributes of a file to its header.
func addXattrs(header *tar.Header, dir int, name string) error {
	names, err := listXattrs(dir, name)
	if err != nil {
		return err
	}
	for _, attribute := range names {
		if !kept(attribute) {
			continue
		}
		value, found, err := getXattr(dir, name, attribute)
		if err != nil {
			return err
		}
		if !found {
			continue
		}
		if header.PAXRecords == nil {
			header.PAXRecords = map[string]string{}
		}
		header.PAXRecords[ocitar.XattrRecord+attribute] = value
	}
	return nil
}

// subdir writes a directory, unless it is the same in lower layers, with what is in it.
func (w *writer) subdir(dir int, name string, header *tar.Header, stat *unix.Stat_t, skip Skip, same bool) error {
	if !same {
		if err := w.tar.WriteHeader(header); err != nil {
			return err
		}
	}
	if skip == Content || stat.Dev != w.dev { // another file system is mounted there
		return nil
	}
	if w.opts.Upper {
		opaque, err := hasAny(dir, name, opaqueMarks)
		if err != nil {
			return err
		}
		if opaque {
			if err := w.whiteout(header.Name + ocitar.Opaque); err != nil {
				return err
			}
		}
	}
	inner, err := dirfd.OpenDir(dir, name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = inner.Close() }()
	return w.dir(inner, header.Name)
}

// file writes a regular file. One that changes meanwhile is written in the size that it had.
func (w *writer) file(dir int, path, name string, header *tar.Header) error {
	file, err := dirfd.Open(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	if w.opts.Replace != nil && header.Size <= MaxReplaced {
		read := func() ([]byte, error) { return io.ReadAll(io.LimitReader(file, MaxReplaced)) }
		if content, err := w.opts.Replace(path, read); content != nil || err != nil {
			return errors.Join(err, w.replaced(header, content))
		}
	}
	if err := w.tar.WriteHeader(header); err != nil {
		return err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{w.tar}, io.LimitReader(struct{ io.Reader }{file}, header.Size), w.buf)
	if err != nil || n == header.Size {
		return err
	}
	_, err = io.CopyN(w.tar, zeros{}, header.Size-n) // it has become shorter
	return err
}

// MaxReplaced is how large files may be, in bytes, that are written with another content.
const MaxReplaced = 4 << 20

// replaced writes a regular file with another content.
func (w *writer) replaced(header *tar.Header, content []byte) error {
	header.Size = int64(len(content))
	if err := w.tar.WriteHeader(header); err != nil {
		return err
	}
	_, err := w.tar.Write(content)
	return err
}

// zeros is a reader of zeros.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
