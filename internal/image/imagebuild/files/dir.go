package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Dir is a directory of the host. All in it is root's. It is a [Tree].
type Dir struct{ root *os.Root }

// OpenDir opens a directory. Nothing that is done with it leads out of it.
func OpenDir(dir string) (*Dir, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Dir{root}, nil
}

// Close closes the directory.
func (d *Dir) Close() error { return d.root.Close() }

// at returns a name as the os package has it.
func at(name string) string {
	if name == "" {
		return "."
	}
	return name
}

// Lstat tells of a file.
func (d *Dir) Lstat(name string) (File, error) {
	info, err := d.root.Lstat(at(name))
	if err != nil {
		return File{}, err
	}
	kind, ok := typeOf(info.Mode())
	if !ok {
		return File{}, fmt.Errorf("%q is %s: only files, directories and links can be copied", name, info.Mode().Type())
	}
	file := File{Mode: kind | permissions(info.Mode()), Size: info.Size(), ModTime: info.ModTime()}
	if kind == unix.S_IFLNK {
		file.Mode = kind | 0o777
		file.Link, err = d.root.Readlink(at(name))
	}
	return file, err
}

// typeOf returns the type of a file as stat(2) has it; ok is false for what can't be copied.
func typeOf(mode fs.FileMode) (kind uint32, ok bool) {
	switch mode.Type() {
	case 0:
		return unix.S_IFREG, true
	case fs.ModeDir:
		return unix.S_IFDIR, true
	case fs.ModeSymlink:
		return unix.S_IFLNK, true
	case fs.ModeNamedPipe:
		return unix.S_IFIFO, true
	default:
		return 0, false
	}
}

func permissions(mode fs.FileMode) uint32 {
	bits := uint32(mode.Perm())
	for from, to := range map[fs.FileMode]uint32{fs.ModeSetuid: unix.S_ISUID, fs.ModeSetgid: unix.S_ISGID, fs.ModeSticky: unix.S_ISVTX} {
		if mode&from != 0 {
			bits |= to
		}
	}
	return bits
}

// Names returns the names in a directory. Sockets have none, as in docker.
func (d *Dir) Names(name string) ([]string, error) {
	file, err := d.root.Open(at(name))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	entries, err := file.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	names := []string{}
	for _, entry := range entries {
		if entry.Type() != fs.ModeSocket {
			names = append(names, entry.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// Open opens a regular file.
func (d *Dir) Open(name string) (io.ReadCloser, error) {
	// What was a file before may be a pipe now, which would wait for its writer.
	file, err := d.root.OpenFile(at(name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%q is no regular file", name)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}
