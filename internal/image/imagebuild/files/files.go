// Package files has what instructions of a Dockerfile take files from: the build's context, which
// is a directory of the host or an archive, and the trees of images and stages. No link in any of
// them leads out: paths are followed within, as if its root were /.
package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// File is what is known of a file.
type File struct {
	// Mode is its type and permissions, as in stat(2).
	Mode     uint32
	UID, GID uint32
	// Size is that of a regular file, in bytes.
	Size    int64
	ModTime time.Time
	// Link is what a symbolic link leads to.
	Link string
	// Device is the device that a device's file stands for, as in stat(2).
	Device uint64
	// Xattrs are its extended attributes.
	Xattrs map[string][]byte
	// ID is the same for all names of one file, and nothing else's. Nil: it has one name.
	ID any
}

// Type returns the bits of the mode that are the type.
func (f File) Type() uint32 { return f.Mode & unix.S_IFMT }

// IsDir reports whether it is a directory.
func (f File) IsDir() bool { return f.Type() == unix.S_IFDIR }

// IsRegular reports whether it is a regular file.
func (f File) IsRegular() bool { return f.Type() == unix.S_IFREG }

// Tree is files that can be copied. Names are relative to its root, which is the empty one; no
// part of them is a link, `.` or `..`. What is not there is [fs.ErrNotExist].
type Tree interface {
	// Lstat tells of a file, of a link itself.
	Lstat(name string) (File, error)
	// Names returns the names in a directory, in order.
	Names(name string) ([]string, error)
	// Open opens a regular file.
	Open(name string) (io.ReadCloser, error)
}

const (
	// maxFollowed is how many symbolic links one path may lead through, as in Linux.
	maxFollowed = 40
	// maxPath is the longest path, in bytes.
	maxPath = 4095
)

var (
	errLoop = errors.New("the path leads through too many symbolic links")
	errLong = fmt.Errorf("the path is longer than %d bytes", maxPath)
)

// Resolve follows a path, and all links in it, within a tree. It returns the file's own name. The
// error matches [fs.ErrNotExist] if there is none; then the name is the one that it would have.
func Resolve(tree Tree, name string) (string, File, error) {
	var done []string
	todo := strings.Split(name, "/")
	file, err := tree.Lstat("")
	for followed := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			done = done[:max(0, len(done)-1)]
			file, err = tree.Lstat(strings.Join(done, "/"))
			continue
		}
		if len(part) > maxPath || len(done) > maxPath {
			return "", File{}, errLong
		}
		if err == nil && !file.IsDir() {
			return "", File{}, &fs.PathError{Op: "open", Path: strings.Join(done, "/"), Err: unix.ENOTDIR}
		}
		next := strings.Join(append(done, part), "/")
		if err == nil {
			file, err = tree.Lstat(next)
		}
		if err == nil && file.Type() == unix.S_IFLNK {
			if followed++; followed > maxFollowed {
				return "", File{}, errLoop
			}
			if path.IsAbs(file.Link) {
				done = nil
			}
			todo = append(strings.Split(file.Link, "/"), todo...)
			file, err = tree.Lstat(strings.Join(done, "/"))
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", File{}, err
		}
		done = append(done, part)
	}
	return strings.Join(done, "/"), file, err
}

// HasWildcard reports whether a path is a pattern.
func HasWildcard(name string) bool { return strings.ContainsAny(name, `*?[\`) }

// Glob returns the names in a tree that a pattern matches, in order. A wildcard matches no slash.
// The error matches [path.ErrBadPattern] if it is none.
func Glob(tree Tree, pattern string) ([]string, error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, err
	}
	found := []string{""}
	for part := range strings.SplitSeq(pattern, "/") {
		var next []string
		for _, dir := range found {
			if !HasWildcard(part) {
				next = append(next, path.Join(dir, part))
				continue
			}
			actual, file, err := Resolve(tree, dir)
			if err != nil || !file.IsDir() {
				continue // nothing there is matched
			}
			names, err := tree.Names(actual)
			if err != nil {
				return nil, err
			}
			for _, name := range names {
				if ok, _ := path.Match(part, name); ok {
					next = append(next, path.Join(dir, name))
				}
			}
		}
		found = next
	}
	var there []string
	for _, name := range found {
		_, _, err := Resolve(tree, name)
		switch {
		case err == nil:
			there = append(there, name)
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR):
			return nil, fmt.Errorf("%q: %w", name, err)
		}
	}
	return there, nil
}
