package ocilayer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/image/ext4fs"
	"github.com/smolvm/smolvm/internal/ocitar"
)

// Bounds of one name.
const (
	maxName = 255  // of a file, in bytes
	maxPath = 4095 // of a path or what a link leads to, in bytes
	// maxDepth is how deep directories may be in each other.
	maxDepth = 2048
	// maxFollowed is how many symbolic links one path may lead through, as in containerd.
	maxFollowed = 255
	// maxID is the largest id of a user or group: the next one means none.
	maxID = 1<<32 - 2
	// maxMajor and maxMinor are the largest numbers of a device in Linux.
	maxMajor, maxMinor = 1<<12 - 1, 1<<20 - 1
	implicitMode       = 0o755 // of directories that are in no layer themselves
)

// tree is a root file system in the making.
type tree struct {
	root    *ext4fs.Node
	content Content
	// names counts the names of files that have several.
	names map[*ext4fs.Node]int
	// unpacked are the files that the layer has made so far, and linked the hard links:
	// what makes a directory opaque leaves them.
	unpacked map[*ext4fs.Node]bool
	linked   map[edge]bool
	// opaque are the directories that it has made opaque: as in containerd once is enough.
	opaque map[*ext4fs.Node]bool
	// plain reports that what is applied is no layer, and names of whiteouts are refused.
	plain bool
}

// edge is a name in a directory.
type edge struct {
	dir  *ext4fs.Node
	name string
}

func newTree(content Content) *tree {
	return &tree{root: newDir(), content: content, names: map[*ext4fs.Node]int{}}
}

func newDir() *ext4fs.Node {
	return &ext4fs.Node{Mode: unix.S_IFDIR | implicitMode, ModTime: time.Unix(0, 0), Children: map[string]*ext4fs.Node{}}
}

// apply applies the archive of a layer.
func (t *tree) apply(ctx context.Context, archive *tar.Reader, left *budget) error {
	t.unpacked, t.linked = map[*ext4fs.Node]bool{}, map[edge]bool{}
	t.opaque = map[*ext4fs.Node]bool{}
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := left.take(header); err != nil {
			return err
		}
		if err := t.applyEntry(header, archive); err != nil {
			return fmt.Errorf("%.300q: %w", header.Name, err)
		}
	}
}

// applyEntry applies an entry of a layer.
func (t *tree) applyEntry(header *tar.Header, content io.Reader) error {
	if err := check(header); err != nil {
		return err
	}
	name := path.Clean(header.Name)
	parent, base := path.Split(name)
	if base == "." || base == ".." && parent == "" {
		return nil // the root: containerd leaves it as it is
	}
	dir, err := t.makeDirs(parent)
	if err != nil {
		return err
	}
	switch {
	case base == ".." || base == "": // of a path that leads above the root
		return nil
	case len(base) > maxName:
		return fmt.Errorf("the name is longer than %d bytes", maxName)
	case t.plain && strings.HasPrefix(base, ocitar.Whiteout):
		return errWhiteout
	case base == ocitar.Opaque && t.opaque[dir]:
		return nil
	case base == ocitar.Opaque:
		t.opaque[dir] = true
		return t.makeOpaque(dir)
	case strings.HasPrefix(base, ocitar.Whiteout):
		hidden := strings.TrimPrefix(base, ocitar.Whiteout)
		if hidden == "" || hidden == "." || hidden == ".." {
			return errors.New("it hides no file")
		}
		return t.remove(dir, hidden)
	case header.Typeflag == tar.TypeXGlobalHeader:
		return nil
	}
	return t.put(dir, base, header, content)
}

// check checks what can be checked of an entry by itself.
func check(header *tar.Header) error {
	switch {
	case strings.Contains(header.Name, "\x00") || strings.Contains(header.Linkname, "\x00"):
		return errors.New("the name has a NUL")
	case len(header.Name) > maxPath, len(header.Linkname) > maxPath:
		return fmt.Errorf("the path is longer than %d bytes", maxPath)
	case header.Uid < 0, header.Uid > maxID, header.Gid < 0, header.Gid > maxID:
		return fmt.Errorf("there is no owner %d:%d", header.Uid, header.Gid)
	case header.Size < 0:
		return errors.New("the size is below zero")
	}
	return nil
}

// walker is a path that is being followed.
type walker struct {
	dirs []*ext4fs.Node // from the root on; never empty
	// missing are the names behind the last of them that are not there.
	missing  []string
	followed int
	// file reports whether the path has come to a file behind the last of dirs: from there it
	// leads up only.
	file bool
}

func (w *walker) at() *ext4fs.Node { return w.dirs[len(w.dirs)-1] }

// up goes to the directory above.
func (w *walker) up() {
	switch {
	case w.file:
		w.file = false
	case len(w.missing) > 0:
		w.missing = w.missing[:len(w.missing)-1]
	case len(w.dirs) > 1: // the root is above itself
		w.dirs = w.dirs[:len(w.dirs)-1]
	}
}

var (
	errWhiteout = errors.New("in an image a name that begins with .wh. hides another, and is that of no file")

	errNoDir  = errors.New("a part of the path is no directory")
	errLoop   = errors.New("the path leads through too many symbolic links")
	errTooLow = fmt.Errorf("there are more than %d directories in each other", maxDepth)
)

// walk follows a path from the root on, and all symbolic links in it, which lead to places in
// the tree, whatever they say.
func (t *tree) walk(name string) (*walker, error) {
	w := &walker{dirs: []*ext4fs.Node{t.root}}
	err := t.follow(w, name)
	if err == nil && w.file {
		err = errNoDir
	}
	return w, err
}

func (t *tree) follow(w *walker, name string) error {
	if path.IsAbs(name) {
		w.dirs, w.missing, w.file = w.dirs[:1], nil, false
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." {
			continue
		}
		if part == ".." {
			w.up()
			continue
		}
		if w.file {
			return errNoDir
		}
		if len(part) > maxName {
			return fmt.Errorf("a part of the path is longer than %d bytes", maxName)
		}
		if len(w.dirs)+len(w.missing) > maxDepth {
			return errTooLow
		}
		next := w.at().Children[part]
		switch {
		case len(w.missing) > 0 || next == nil:
			w.missing = append(w.missing, part)
		case next.IsDir():
			w.dirs = append(w.dirs, next)
		case next.Mode&unix.S_IFMT == unix.S_IFLNK:
			if w.followed++; w.followed > maxFollowed {
				return errLoop
			}
			target := next.Link
			if !path.IsAbs(target) {
				target = path.Clean(target)
			}
			if err := t.follow(w, target); err != nil {
				return err
			}
		default:
			w.file = true
		}
	}
	return nil
}

// makeDirs follows a path to a directory, and makes what is missing of it.
func (t *tree) makeDirs(name string) (*ext4fs.Node, error) {
	w, err := t.walk(name)
	if err != nil {
		return nil, err
	}
	dir := w.at()
	for _, part := range w.missing {
		made := newDir()
		if dir.Mode&unix.S_ISGID != 0 { // as the kernel has it
			made.GID = dir.GID
		}
		dir.Children[part] = made
		dir = made
	}
	return dir, nil
}

// makeOpaque removes what lower layers have in a directory.
func (t *tree) makeOpaque(dir *ext4fs.Node) error {
	for name, child := range dir.Children {
		switch {
		case !t.unpacked[child] && !t.linked[edge{dir, name}]:
			if err := t.remove(dir, name); err != nil {
				return err
			}
		case child.IsDir():
			if err := t.makeOpaque(child); err != nil {
				return err
			}
		}
	}
	return nil
}

// remove removes a file with all that is in it, if it is there.
func (t *tree) remove(dir *ext4fs.Node, name string) error {
	n := dir.Children[name]
	if n == nil {
		return nil
	}
	delete(dir.Children, name)
	delete(t.linked, edge{dir, name})
	return t.drop(n)
}

// drop gives up a file that has lost a name.
func (t *tree) drop(n *ext4fs.Node) error {
	for name, child := range n.Children {
		delete(t.linked, edge{n, name})
		if err := t.drop(child); err != nil {
			return err
		}
	}
	if t.names[n] > 1 {
		t.names[n]--
		return nil
	}
	delete(t.names, n)
	delete(t.unpacked, n)
	return t.content.Free(n.Data)
}

// put puts an entry in its place, and removes what is there. Of two directories one is made.
func (t *tree) put(dir *ext4fs.Node, name string, header *tar.Header, content io.Reader) error {
	n := dir.Children[name]
	if n == nil || !n.IsDir() || header.Typeflag != tar.TypeDir {
		if err := t.remove(dir, name); err != nil {
			return err
		}
		var err error
		if n, err = t.make(header, content); err != nil {
			return err
		}
	}
	dir.Children[name] = n
	if header.Typeflag == tar.TypeLink {
		t.linked[edge{dir, name}] = true
		t.names[n] = max(t.names[n], 1) + 1
	} else {
		t.unpacked[n] = true
	}
	n.UID, n.GID, n.ModTime = uint32(header.Uid), uint32(header.Gid), bounded(header.ModTime)
	if kind := n.Mode & unix.S_IFMT; kind != unix.S_IFLNK {
		n.Mode = kind | uint32(header.Mode)&0o7777
	}
	addXattrs(n, header.PAXRecords)
	return nil
}

// make makes a file that has nothing but its type and content, or finds the one that a hard
// link is to.
func (t *tree) make(header *tar.Header, content io.Reader) (*ext4fs.Node, error) {
	switch header.Typeflag {
	case tar.TypeDir:
		return newDir(), nil
	case tar.TypeReg:
		data, err := t.content.Add(content, header.Size)
		return &ext4fs.Node{Mode: unix.S_IFREG, Data: data}, err
	case tar.TypeSymlink:
		if header.Linkname == "" {
			return nil, errNowhere
		}
		return &ext4fs.Node{Mode: unix.S_IFLNK | 0o777, Link: header.Linkname}, nil
	case tar.TypeLink:
		return t.linkTarget(header.Linkname)
	case tar.TypeFifo:
		return &ext4fs.Node{Mode: unix.S_IFIFO}, nil
	case tar.TypeChar, tar.TypeBlock:
		if err := checkDevice(header); err != nil {
			return nil, err
		}
		kind := uint32(unix.S_IFCHR)
		if header.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		return &ext4fs.Node{Mode: kind, Device: unix.Mkdev(uint32(header.Devmajor), uint32(header.Devminor))}, nil
	default:
		return nil, unknownType(header)
	}
}

var errNowhere = errors.New("the symbolic link leads nowhere")

func checkDevice(header *tar.Header) error {
	if header.Devmajor < 0 || header.Devmajor > maxMajor || header.Devminor < 0 || header.Devminor > maxMinor {
		return fmt.Errorf("there is no device %d:%d", header.Devmajor, header.Devminor)
	}
	return nil
}

func unknownType(header *tar.Header) error {
	return fmt.Errorf("there is no file of type %q", header.Typeflag)
}

// linkTarget finds the file that a hard link is to: a symbolic link itself, if it is one.
func (t *tree) linkTarget(name string) (*ext4fs.Node, error) {
	parent, base := path.Split(name)
	w, err := t.walk(parent)
	if err != nil {
		return nil, err
	}
	n := w.at().Children[base]
	switch {
	case len(w.missing) > 0 || n == nil:
		return nil, fmt.Errorf("it is a link to %.300q, which is not there", name)
	case n.IsDir():
		return nil, fmt.Errorf("it is a hard link to %.300q, which is a directory", name)
	}
	return n, nil
}

// bounded returns a time as containerd sets it: one that does not fit is the first one.
func bounded(at time.Time) time.Time {
	if at.Before(time.Unix(0, 0)) || at.After(time.Unix(0, 1<<63-1)) {
		return time.Unix(0, 0)
	}
	return at
}

// addXattrs gives a file the extended attributes that an archive has for it, but for those
// that containerd leaves out: of overlay file systems, and of users on what is no file of
// theirs.
func addXattrs(n *ext4fs.Node, records map[string]string) {
	kind := n.Mode & unix.S_IFMT
	var found map[string][]byte
	for record, value := range records {
		name, ok := strings.CutPrefix(record, ocitar.XattrRecord)
		if !ok || strings.HasPrefix(name, "trusted.") || strings.HasPrefix(name, "user.") && kind != unix.S_IFREG && kind != unix.S_IFDIR {
			continue
		}
		if found == nil {
			found = maps.Clone(n.Xattrs)
		}
		if found == nil {
			found = map[string][]byte{}
		}
		found[name] = []byte(value)
	}
	if found != nil {
		n.Xattrs = found
	}
}
