// Package tree carries a file or a tree of files from one machine to another as a
// tar stream: modes, times and symbolic links are kept, owners are not.
//
// The stream's first entry is the root of the tree and is called "."; what is in a
// directory follows as "./a", "./a/b". A receiver trusts nothing of it: whatever
// the stream says, nothing outside the target is touched.
package tree

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
)

// Write writes the tree at root, which may be a link to it. Sockets, pipes and
// devices in it are left out.
func Write(w io.Writer, root string) error {
	// As with cp, a link that the caller names stands for what it points to.
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return err
	}
	out := tar.NewWriter(w)
	err = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		inner, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		return writeEntry(out, name, inner, info)
	})
	if err != nil {
		return err
	}
	return out.Close()
}

func writeEntry(out *tar.Writer, name, inner string, info fs.FileInfo) error {
	var link string
	switch info.Mode().Type() {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		var err error
		if link, err = os.Readlink(name); err != nil {
			return err
		}
	default:
		if inner == "." {
			return &fs.PathError{Op: "copy", Path: name, Err: errors.New("not a file, a directory or a link")}
		}
		return nil
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	header.Name = "."
	if inner != "." {
		header.Name = "./" + filepath.ToSlash(inner)
	}
	header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
	header.Format = tar.FormatPAX // for times below a second, and long names
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	// A file that grows meanwhile is cut at the length that was announced.
	n, err := io.Copy(out, io.LimitReader(file, header.Size))
	if err != nil {
		return err
	}
	if n < header.Size {
		return &fs.PathError{Op: "copy", Path: name, Err: errors.New("file became shorter while it was read")}
	}
	return nil
}

// Target says where a tree is to go.
type Target struct {
	// Path becomes the tree; if it is an existing directory, Path/Name does. The
	// directory that holds it must exist.
	Path string
	// Name of the source, without any directory.
	Name string
	// KeepSetID keeps set-user-id and set-group-id bits. The files become the
	// caller's, so a sender that is not trusted must not get it.
	KeepSetID bool
}

// Extract reads a tree. If that fails in the middle, what has come by then is left
// in place, but for the file that was being written.
func Extract(r io.Reader, target Target) error {
	parent, base, err := target.resolve()
	if err != nil {
		return err
	}
	holder, err := os.OpenRoot(parent)
	if err != nil {
		return err
	}
	x := extractor{root: holder, base: base, keepSetID: target.KeepSetID}
	defer x.close()
	in := tar.NewReader(r)
	for {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = x.entry(header, in)
		}
		if err != nil {
			return fmt.Errorf("receive files: %w", err)
		}
	}
	if !x.any {
		return fmt.Errorf("receive files: nothing came: %w", io.ErrUnexpectedEOF)
	}
	return x.finishDirs()
}

// resolve finds the directory that is to hold the tree, and the tree's name in it.
func (t Target) resolve() (parent, base string, err error) {
	dest := t.Path
	info, err := os.Stat(dest)
	switch {
	case err == nil && info.IsDir():
		if !filepath.IsLocal(t.Name) || t.Name == "." {
			return "", "", fmt.Errorf("name %q of the source can't be used in %s", t.Name, dest)
		}
		return dest, t.Name, nil
	case err == nil:
		// Through a link to a file, as cp does.
		if dest, err = filepath.EvalSymlinks(dest); err != nil {
			return "", "", err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return "", "", err
	case os.IsPathSeparator(t.Path[max(0, len(t.Path)-1)]):
		return "", "", &fs.PathError{Op: "copy to", Path: dest, Err: errors.New("no such directory")}
	}
	return filepath.Dir(dest), filepath.Base(dest), nil
}

// extractor puts entries below root, which nothing can leave: os.Root follows no
// link out of it. For the first entry that is the directory that holds the target;
// if the entry is a directory, it is that one for all others.
type extractor struct {
	root      *os.Root
	base      string
	keepSetID bool
	any, dir  bool
	dirs      []dirTimes // in the order in which they came
}

func (x *extractor) close() { _ = x.root.Close() }

// descend makes the target itself the root.
func (x *extractor) descend() error {
	inner, err := x.root.OpenRoot(x.base)
	if err != nil {
		return err
	}
	x.close()
	x.root, x.base, x.dir = inner, ".", true
	return nil
}

type dirTimes struct {
	name   string
	header *tar.Header
}

func (x *extractor) entry(header *tar.Header, content io.Reader) error {
	// Clean has every ".." at the front, where IsLocal finds it.
	inner := path.Clean(header.Name)
	if !filepath.IsLocal(inner) || (inner == ".") == x.any || x.any && !x.dir {
		return fmt.Errorf("entry %q is not where it belongs", header.Name)
	}
	x.any = true
	name := filepath.Join(x.base, inner)
	switch header.Typeflag {
	case tar.TypeReg:
		return x.file(name, header, content)
	case tar.TypeDir:
		// Writable until all that is in it has come.
		if err := x.root.Mkdir(name, 0o700); err != nil {
			if info, statErr := x.root.Lstat(name); statErr != nil || !info.IsDir() {
				return err
			}
		}
		if inner == "." {
			if err := x.descend(); err != nil {
				return err
			}
		}
		x.dirs = append(x.dirs, dirTimes{inner, header})
		return nil
	case tar.TypeSymlink:
		if err := x.clear(name); err != nil {
			return err
		}
		return x.root.Symlink(header.Linkname, name)
	}
	return fmt.Errorf("entry %q is of a kind that is not copied", header.Name)
}

func (x *extractor) file(name string, header *tar.Header, content io.Reader) error {
	if err := x.clear(name); err != nil {
		return err
	}
	file, err := x.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	if err == nil {
		err = file.Chmod(x.mode(header))
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return errors.Join(err, x.root.Remove(name))
	}
	return x.root.Chtimes(name, header.ModTime, header.ModTime)
}

// clear makes way for an entry, as cp -f does: what is not a directory goes.
func (x *extractor) clear(name string) error {
	info, err := x.root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return &fs.PathError{Op: "replace", Path: name, Err: errors.New("is a directory")}
	}
	return x.root.Remove(name)
}

// finishDirs gives directories their modes and times, the deepest first.
func (x *extractor) finishDirs() error {
	for i := len(x.dirs) - 1; i >= 0; i-- {
		dir := x.dirs[i]
		if err := x.root.Chmod(dir.name, x.mode(dir.header)); err != nil {
			return err
		}
		if err := x.root.Chtimes(dir.name, dir.header.ModTime, dir.header.ModTime); err != nil {
			return err
		}
	}
	return nil
}

func (x *extractor) mode(header *tar.Header) fs.FileMode {
	mode := header.FileInfo().Mode()
	keep := fs.ModePerm | fs.ModeSticky
	if x.keepSetID {
		keep |= fs.ModeSetuid | fs.ModeSetgid
	}
	return mode & keep
}
