// Package tree carries a file or a tree of files from one machine to another.
//
// A copy is a stream of frames that an [Encoder] writes and a [Decoder] reads:
//
//	a file        its entry, its content in pieces of data and holes, its end
//	a directory   its entry, all that is in it, its end
//	a link        its entry
//	a note        what was left out, or changed meanwhile
//	the end       of the whole tree, or why there is no more of it
//
// The stream's first entry is the root of the tree; it has no name, as the receiver
// chooses one. All others have a name without a directory: where they belong follows
// from the directories that were begun and not ended. So no name can point out of the
// tree, and a receiver keeps nothing but the directories that it is in.
//
// A stream of a format of our own, and not tar: tar can't say that a file failed in
// its middle, has holes only in forms that package archive/tar does not write, and
// makes a receiver remember directories until the end.
//
// Modes, times and symbolic links are kept; owners, hard links and extended attributes
// are not. A receiver trusts nothing of the stream: see [Receive].
package tree

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// Kind is what an [Entry] is.
type Kind byte

// The kinds of entries. Their values are those of frames.
const (
	File     Kind = 'F'
	Dir      Kind = 'D'
	Symlink  Kind = 'L'
	HardLink Kind = 'H'
)

// The bounds of what a stream may hold. A name is as long as the longest that a file
// system of Linux has (255 characters of up to four bytes); a link and the path in a
// note are as long as the kernel takes them.
const (
	maxName = 1024
	maxPath = 4096
	maxText = 1024
	// maxDepth is how deep directories may be nested: deeper ones can't be named in a
	// path of 4096 bytes.
	maxDepth = 2048
	// maxChunk is the longest piece of content, in bytes.
	maxChunk = 64 << 10
)

// DefaultMaxEntries is how many entries and notes a stream may have, unless
// [Limits] says otherwise.
const DefaultMaxEntries = smolvm.DefaultCopyFiles

// Entry is the beginning of a file, a directory or a link.
type Entry struct {
	Kind Kind
	// Name is any bytes but a slash and NUL; it is empty for the root.
	Name string
	// Mode holds the permissions, with the set-id bits and the sticky bit where the
	// kernel has them: see inode(7).
	Mode    uint32
	ModTime time.Time
	// Size is how long a file was when it was opened, in bytes. Its content may be
	// shorter or longer.
	Size int64
	// Link is where a link leads: for a HardLink a path from the tree's root.
	Link string
	// Implicit reports whether the sender knows nothing of a directory but its name.
	Implicit bool
}

// Note tells of something that a copy left out, or did in another way.
type Note struct {
	// Path is the file, as its own side names it: any bytes.
	Path string
	// Text says what happened to it.
	Text string
	// Failed reports whether the copy is incomplete because of it.
	Failed bool
}

func (n Note) String() string {
	if n.Path == "" {
		return n.Text
	}
	return Display(n.Path) + ": " + n.Text
}

// Display returns a path as messages show it: quoted if it holds bytes that are no
// text.
func Display(path string) string {
	quoted := fmt.Sprintf("%q", path)
	if quoted[1:len(quoted)-1] == path {
		return path
	}
	return quoted
}

// Limits bounds what a receiver takes. The zero value is useful.
type Limits struct {
	// MaxEntries is how many entries and notes may come. Zero: [DefaultMaxEntries].
	MaxEntries int64
	// MaxBytes is how long all files may be together, holes and all. Zero: any
	// length.
	MaxBytes int64
}

// ErrLimit is matched by the error of a copy that went beyond a limit.
var ErrLimit = smolvm.ErrCopyLimit

// ErrEmptyPath is matched by the error of a copy from or to a path that is empty.
var ErrEmptyPath = errors.New("empty path")

// CheckPath reports whether a path can be one: not empty, and without NUL.
func CheckPath(path string) error {
	switch {
	case path == "":
		return ErrEmptyPath
	case strings.ContainsRune(path, 0):
		return fmt.Errorf("path %q: %w: it has a NUL character", path, fs.ErrInvalid)
	case len(path) >= maxPath:
		return &fs.PathError{Op: "use", Path: path[:64] + "...", Err: unix.ENAMETOOLONG}
	}
	return nil
}

// SourceName returns the name that a copy of path has in an existing directory, and
// whether it is the source's contents that are copied there, not the source: as with
// cp and docker cp, for a path that ends in "/.", in "..", or is the root.
func SourceName(path string) (name string, contents bool) {
	path = strings.TrimRight(path, "/")
	name = path[strings.LastIndexByte(path, '/')+1:]
	if name == "" || name == "." || name == ".." {
		return "", true
	}
	return name, false
}

// Permissions returns what of an entry's mode is given to a file: of an untrusted
// sender no set-id bits.
func (e Entry) Permissions(untrusted bool) uint32 {
	if !untrusted {
		return e.Mode & 0o7777
	}
	if e.Kind == Dir {
		return e.Mode & 0o1777
	}
	return e.Mode & 0o777
}
