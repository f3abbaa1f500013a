package layertar

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
	"github.com/smolvm/smolvm/internal/ocitar"
)

// extractor unpacks an archive into a directory.
type extractor struct {
	root *os.File
	// dirs are the times of directories, which are set when all that is in them has come.
	dirs map[string]time.Time
}

// Extract unpacks the archive of a layer into a directory, which must exist: with owners,
// modes, times and extended attributes, and what it hides is removed. Links in paths lead to
// places in the directory, whatever they say. Entries are not checked: who sends them may write
// anything there.
func Extract(ctx context.Context, r io.Reader, dir string) error {
	root, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	e := &extractor{root: root, dirs: map[string]time.Time{}}
	archive := tar.NewReader(r)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := e.entry(header, archive); err != nil {
			return fmt.Errorf("%.300q: %w", header.Name, err)
		}
	}
	for name, at := range e.dirs {
		if inner, err := e.open(name); err == nil {
			_ = dirfd.SetTime(int(inner.Fd()), ".", at)
			_ = inner.Close()
		}
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

// open opens a directory by its path, in which links lead to places in the root.
func (e *extractor) open(name string) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	var fd int
	err := dirfd.Retry(func() (err error) {
		fd, err = unix.Openat2(int(e.root.Fd()), "./"+name, &how)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// makeDir opens a directory, and makes it and those above it if they are not there.
func (e *extractor) makeDir(name string) (*os.File, error) {
	dir, err := e.open(name)
	if !errors.Is(err, unix.ENOENT) || name == "" || name == "." {
		return dir, err
	}
	parent, base := path.Split(path.Clean(name))
	above, err := e.makeDir(path.Clean(parent))
	if err != nil {
		return nil, err
	}
	defer func() { _ = above.Close() }()
	if err := unix.Mkdirat(int(above.Fd()), base, 0o755); err != nil {
		return nil, err // a link that leads nowhere, too
	}
	return e.open(name)
}

func (e *extractor) entry(header *tar.Header, content io.Reader) error {
	name := strings.TrimPrefix(path.Clean("/"+header.Name), "/")
	parent, base := path.Split(name)
	if base == "" || header.Typeflag == tar.TypeXGlobalHeader {
		return nil // the root itself
	}
	dir, err := e.makeDir(path.Clean(parent))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	switch {
	case base == ocitar.Opaque:
		return clearDir(dir)
	case strings.HasPrefix(base, ocitar.Whiteout):
		return removeAll(dir, strings.TrimPrefix(base, ocitar.Whiteout))
	}
	made, err := e.make(dir, base, header, content)
	if made == nil || err != nil {
		return err
	}
	if header.Typeflag == tar.TypeDir {
		e.dirs[name] = header.ModTime
	}
	return made(int(dir.Fd()), base)
}

// attributes sets on a file what an entry says of it.
type attributes func(dir int, name string) error

// make makes a file, in place of what is there, and returns what is to be set on it.
func (e *extractor) make(dir *os.File, name string, header *tar.Header, content io.Reader) (attributes, error) {
	fd := int(dir.Fd())
	stat, statErr := dirfd.Lstat(fd, name)
	there := statErr == nil
	both := there && header.Typeflag == tar.TypeDir && stat.Mode&unix.S_IFMT == unix.S_IFDIR
	if there && !both {
		if err := removeAll(dir, name); err != nil {
			return nil, err
		}
	}
	var err error
	set := func(dir int, name string) error { return setAttributes(dir, name, header) }
	device := int(unix.Mkdev(uint32(header.Devmajor), uint32(header.Devminor)))
	switch header.Typeflag {
	case tar.TypeDir:
		if !both {
			err = unix.Mkdirat(fd, name, 0o700)
		}
	case tar.TypeReg:
		err = writeFile(fd, name, content)
	case tar.TypeSymlink:
		err = unix.Symlinkat(header.Linkname, fd, name)
	case tar.TypeLink:
		return nil, e.link(header.Linkname, fd, name)
	case tar.TypeFifo:
		err = unix.Mknodat(fd, name, unix.S_IFIFO|0o600, 0)
	case tar.TypeChar:
		err = unix.Mknodat(fd, name, unix.S_IFCHR|0o600, device)
	case tar.TypeBlock:
		err = unix.Mknodat(fd, name, unix.S_IFBLK|0o600, device)
	default:
		err = fmt.Errorf("there is no file of type %q", header.Typeflag)
	}
	return set, err
}

// link makes a hard link.
func (e *extractor) link(target string, dir int, name string) error {
	parent, base := path.Split(strings.TrimPrefix(path.Clean("/"+target), "/"))
	from, err := e.open(path.Clean(parent))
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	return unix.Linkat(int(from.Fd()), base, dir, name, 0)
}

func writeFile(dir int, name string, content io.Reader) error {
	file, err := dirfd.Open(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(struct{ io.Writer }{file}, content)
	return errors.Join(err, file.Close())
}

// setAttributes sets owner, mode, extended attributes and time of a file, in the order in
// which none of them undoes another: a change of the owner takes set-id bits and capabilities.
func setAttributes(dir int, name string, header *tar.Header) error {
	if err := unix.Fchownat(dir, name, header.Uid, header.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if header.Typeflag != tar.TypeSymlink {
		if err := unix.Fchmodat(dir, name, uint32(header.Mode)&0o7777, 0); err != nil {
			return err
		}
	}
	for record, value := range header.PAXRecords {
		attribute, ok := strings.CutPrefix(record, ocitar.XattrRecord)
		if !ok || !kept(attribute) {
			continue
		}
		err := unix.Lsetxattr(pathOf(dir, name), attribute, []byte(value), 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) { // users' on what is no file of theirs
			return fmt.Errorf("set its extended attribute %s: %w", attribute, err)
		}
	}
	_ = dirfd.SetTime(dir, name, header.ModTime)
	return nil
}

// clearDir removes what is in a directory.
func clearDir(dir *os.File) error {
	for {
		names, err := dir.Readdirnames(1024)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := removeAll(dir, name); err != nil {
				return err
			}
		}
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
}

// removeAll removes what a directory has under a name, with all that is in it, if it is there.
func removeAll(dir *os.File, name string) error {
	if name == "" || name == "." || name == ".." {
		return errors.New("it hides no file")
	}
	fd := int(dir.Fd())
	err := unix.Unlinkat(fd, name, 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.EISDIR):
		return err
	}
	inner, err := dirfd.OpenDir(fd, name)
	if err != nil {
		return err
	}
	err = clearDir(inner)
	if err := errors.Join(err, inner.Close()); err != nil {
		return err
	}
	return unix.Unlinkat(fd, name, unix.AT_REMOVEDIR)
}
