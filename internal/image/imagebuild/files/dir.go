package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
	"golang.org/x/sys/unix"
)

// IgnoreFile is the name of the file that says what is no part of a context.
const IgnoreFile = ".dockerignore"

// maxIgnoreSize is how long such a file may be, in bytes.
const maxIgnoreSize = 1 << 20

// Dir is a directory of the host, without what its .dockerignore excludes. All in it is root's.
// It is a [Tree].
type Dir struct {
	root   *os.Root
	ignore *Ignore
}

// OpenDir opens a directory. Nothing that is done with it leads out of it.
func OpenDir(dir string) (*Dir, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Dir{root: root, ignore: &Ignore{}}, nil
}

// Close closes the directory.
func (d *Dir) Close() error { return d.root.Close() }

// SetIgnore has what the patterns match be left out from now on.
func (d *Dir) SetIgnore(ignore *Ignore) { d.ignore = ignore }

// at returns a name as the os package has it.
func at(name string) string {
	if name == "" {
		return "."
	}
	return name
}

// Lstat tells of a file.
func (d *Dir) Lstat(name string) (File, error) {
	if ignored, err := d.ignored(name); err != nil || ignored {
		return File{}, errors.Join(err, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist})
	}
	return d.lstat(name)
}

func (d *Dir) lstat(name string) (File, error) {
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

// ignored reports whether a file is left out, but not if something in it is not.
func (d *Dir) ignored(name string) (bool, error) {
	ignored, err := d.ignore.Matches(name)
	if err != nil || !ignored {
		return false, err
	}
	if !d.ignore.hasExceptions() {
		return true, nil
	}
	info, err := d.root.Lstat(at(name))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	entries, err := d.entries(name)
	if err != nil {
		return false, err
	}
	for _, entry := range entries {
		if ignored, err := d.ignored(path.Join(name, entry.Name())); err != nil || !ignored {
			return false, err
		}
	}
	return true, nil
}

func (d *Dir) entries(name string) ([]fs.DirEntry, error) {
	file, err := d.root.Open(at(name))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	return file.ReadDir(-1)
}

// Names returns the names in a directory. Sockets have none, as in docker.
func (d *Dir) Names(name string) ([]string, error) {
	entries, err := d.entries(name)
	if err != nil {
		return nil, err
	}
	names := []string{}
	for _, entry := range entries {
		if entry.Type() == fs.ModeSocket {
			continue
		}
		ignored, err := d.ignored(path.Join(name, entry.Name()))
		if err != nil {
			return nil, err
		}
		if !ignored {
			names = append(names, entry.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// Open opens a regular file, one that is left out too.
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

// ReadSmall reads a file of a tree that has no more than so many bytes. Links are followed.
func ReadSmall(tree interface {
	Open(name string) (io.ReadCloser, error)
}, name string, most int64) ([]byte, error) {
	file, err := tree.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	text, err := io.ReadAll(io.LimitReader(file, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("%q is longer than %d bytes", name, most)
	}
	return text, err
}

// Ignore is what is left out of a tree. The zero value leaves nothing out.
type Ignore struct {
	matcher *patternmatcher.PatternMatcher
}

// NewIgnore takes patterns as .dockerignore has them.
func NewIgnore(patterns []string) (*Ignore, error) {
	if len(patterns) == 0 {
		return &Ignore{}, nil
	}
	matcher, err := patternmatcher.New(patterns)
	return &Ignore{matcher}, err
}

// ReadIgnore reads a file of patterns. There may be none.
func ReadIgnore(tree interface {
	Open(name string) (io.ReadCloser, error)
}, name string) (ignore *Ignore, there bool, err error) {
	file, err := tree.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return &Ignore{}, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	defer func() { _ = file.Close() }()
	limited := &io.LimitedReader{R: file, N: maxIgnoreSize}
	patterns, err := ignorefile.ReadAll(limited)
	if err == nil && limited.N == 0 {
		err = fmt.Errorf("it is longer than %d bytes", maxIgnoreSize)
	}
	if err == nil {
		ignore, err = NewIgnore(patterns)
	}
	if err != nil {
		return nil, true, fmt.Errorf("%s: %w", name, err)
	}
	return ignore, true, nil
}

// Matches reports whether a file is left out, by itself or with a directory that it is in.
func (i *Ignore) Matches(name string) (bool, error) {
	if i.matcher == nil || name == "" {
		return false, nil
	}
	return i.matcher.MatchesOrParentMatches(name)
}

func (i *Ignore) hasExceptions() bool { return i.matcher != nil && i.matcher.Exclusions() }
