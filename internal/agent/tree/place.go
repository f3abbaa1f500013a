package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// Target says where a copy is to go.
type Target struct {
	// Path becomes the file or the tree; if it is an existing directory, Path/Name does,
	// or with Contents what is in the tree goes into it. The directory that holds it
	// must exist.
	Path string
	// Name and Contents are as [SourceName] has them.
	Name     string
	Contents bool
	// IntoDir says that Path must be an existing directory.
	IntoDir bool
	// Untrusted reports whether the sender may mean harm to the receiver: see
	// [Receive].
	Untrusted bool
	// KeepLinks has links of an untrusted sender made wherever they lead.
	KeepLinks bool
}

// place is where the root of a tree goes.
type place struct {
	// path shows it in messages.
	path string
	// dir holds it under name; or is itself it, if name is empty.
	dir  *os.File
	name string
	// special, if it is not nil, is something other than a regular file to write to:
	// a FIFO, a device, or whatever a descriptor of this process is.
	special func(context.Context) (*os.File, error)
}

// errOver returns the error of a file that would take the place of a directory, or the
// other way round.
func errOver(path, what string) error {
	return &fs.PathError{Op: "write", Path: path, Err: errors.New(what)}
}

// find finds the place for a file or a directory, by the rules of cp.
func (t Target) find(kind Kind) (place, error) {
	if err := CheckPath(t.Path); err != nil {
		return place{}, err
	}
	var stat unix.Stat_t
	err := dirfd.Retry(func() error { return unix.Stat(t.Path, &stat) })
	switch {
	case err == nil && stat.Mode&unix.S_IFMT == unix.S_IFDIR:
		return t.inside(kind)
	case err == nil && t.IntoDir:
		return place{}, errOver(t.Path, "it is not a directory")
	case err == nil:
		return t.over(t.Path, kind)
	case !errors.Is(err, fs.ErrNotExist):
		return place{}, &fs.PathError{Op: "write", Path: t.Path, Err: err}
	}
	return t.new(kind)
}

// inside finds the place in a directory that exists.
func (t Target) inside(kind Kind) (place, error) {
	if t.Contents {
		if kind != Dir {
			return place{}, errOver(t.Path, "it is a directory, and the source is not")
		}
		dir, err := openDir(t.Path)
		return place{path: t.Path, dir: dir}, err
	}
	if !isName(t.Name) {
		return place{}, fmt.Errorf("write %s: %q is no name of a file", Display(t.Path), t.Name)
	}
	path := strings.TrimRight(t.Path, "/") + "/" + t.Name
	var stat unix.Stat_t
	err := dirfd.Retry(func() error { return unix.Lstat(path, &stat) })
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return place{}, &fs.PathError{Op: "write", Path: path, Err: err}
	case stat.Mode&unix.S_IFMT == unix.S_IFDIR && kind != Dir:
		return place{}, errOver(path, "it is a directory, and the source is not")
	case stat.Mode&unix.S_IFMT != unix.S_IFDIR:
		return t.over(path, kind)
	}
	dir, err := openDir(t.Path)
	return place{path: path, dir: dir, name: t.Name}, err
}

// new finds the place for what is not there yet.
func (t Target) new(kind Kind) (place, error) {
	var stat unix.Stat_t
	path := strings.TrimRight(t.Path, "/")
	isLink := unix.Lstat(path, &stat) == nil
	switch {
	case t.IntoDir:
		return place{}, &fs.PathError{Op: "write", Path: t.Path, Err: errors.New("no such directory")}
	case isLink && (!t.Untrusted || kind == Dir):
		return place{}, errOver(path, "it is a symbolic link to what is not there")
	case kind != Dir && path != t.Path:
		return place{}, &fs.PathError{Op: "write", Path: t.Path, Err: errors.New("no such directory")}
	case isLink:
		return t.over(path, kind)
	}
	name := path[strings.LastIndexByte(path, '/')+1:]
	if !isName(name) {
		return place{}, &fs.PathError{Op: "write", Path: t.Path, Err: fs.ErrNotExist}
	}
	return in(path, name)
}

// in returns the place that a path names in its directory.
func in(path, name string) (place, error) {
	parent := path[:len(path)-len(name)]
	if parent == "" {
		parent = "."
	}
	dir, err := openDir(parent)
	return place{path: path, dir: dir, name: name}, err
}

// over returns the place of something that exists and is not a directory.
func (t Target) over(path string, kind Kind) (place, error) {
	if kind == Dir {
		return place{}, errOver(path, "it is not a directory, and the source is one")
	}
	link, err := follow(path)
	if err != nil {
		return place{}, err
	}
	if link.own >= 0 {
		return place{path: path, special: func(context.Context) (*os.File, error) { return dup(link.own, path) }}, nil
	}
	var stat unix.Stat_t
	err = dirfd.Retry(func() error { return unix.Stat(path, &stat) })
	switch {
	case errors.Is(err, fs.ErrNotExist) && t.Untrusted && !link.proc: // a link to what is not there: it is replaced
	case errors.Is(err, fs.ErrNotExist):
		return place{}, errOver(path, "it is a symbolic link to what is not there")
	case err != nil:
		return place{}, &fs.PathError{Op: "write", Path: path, Err: err}
	case stat.Mode&unix.S_IFMT == unix.S_IFDIR:
		return place{}, errOver(path, "it is a directory, and the source is not")
	case stat.Mode&unix.S_IFMT != unix.S_IFREG || link.proc:
		return place{path: path, special: func(ctx context.Context) (*os.File, error) {
			return openWaiting(ctx, path, unix.O_WRONLY|unix.O_TRUNC)
		}}, nil
	case !t.Untrusted:
		path = link.path // as cp does
	}
	return in(path, path[strings.LastIndexByte(path, '/')+1:])
}

// link is the end to which a symbolic link leads.
type link struct {
	path string
	// own is a descriptor of this process, -1 if it is none of those.
	own int
	// proc reports whether the path ends in the kernel's /proc, where files are what they are,
	// and links such as /proc/self/fd/1 lead to things without a path.
	proc bool
}

// follow follows a symbolic link to its end.
func follow(path string) (link, error) {
	found := link{path: path, own: -1}
	for range 40 { // as the kernel does
		parent, err := filepath.EvalSymlinks(filepath.Dir(found.path))
		if err != nil {
			return found, nil //nolint:nilerr // it leads to what is not there
		}
		var stat unix.Statfs_t
		if err := unix.Statfs(parent, &stat); err == nil && stat.Type == unix.PROC_SUPER_MAGIC {
			found.proc = true
			if parent == fmt.Sprintf("/proc/%d/fd", os.Getpid()) {
				found.own, err = strconv.Atoi(filepath.Base(found.path))
				return found, err
			}
			return found, nil
		}
		target, err := os.Readlink(found.path)
		if err != nil {
			return found, nil //nolint:nilerr // it is no link
		}
		if found.path = target; !filepath.IsAbs(target) {
			found.path = parent + "/" + target
		}
	}
	return found, &fs.PathError{Op: "write", Path: path, Err: unix.ELOOP}
}

// dup returns another descriptor of an open file of this process. Opening it by its
// name would begin it from its start, and can't be done with a socket.
func dup(fd int, path string) (*os.File, error) {
	other, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, &fs.PathError{Op: "write", Path: path, Err: err}
	}
	return os.NewFile(uintptr(other), path), nil
}

func openDir(path string) (*os.File, error) {
	var fd int
	err := dirfd.Retry(func() (err error) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrPermission) { // what may not be listed may be entered
			fd, err = unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		}
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "write", Path: strings.TrimSuffix(path, "/"), Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}
