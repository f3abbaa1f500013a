// Package changes finds out what a guest has changed in a directory of the host that it has as an
// overlay, and brings that back. The guest's changes come as the archive of a layer, which is not
// trusted: it says what the guest would have in that directory, and nothing of it reaches anything
// else.
package changes

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/ocitar"
)

const (
	// maxEntries bounds how many files an archive may have, and maxPath a path in it, in bytes.
	maxEntries = 2 << 20
	maxPath    = 4095
	// modeBits are those of a file's mode that are brought back: no set-id bits.
	modeBits = 0o777
)

// Archive is what a guest has changed.
type Archive struct {
	// File is the archive, of Size bytes.
	File io.ReaderAt
	Size int64
}

// Plan is what an archive would change in a directory of the host.
type Plan struct {
	// Changes have paths in the directory, in the order of paths.
	Changes []smolvm.Change
	// Conflicts are the paths of those that have changed on the host too.
	Conflicts []string
	// Special are the paths of what can't be brought back: neither file, directory nor link.
	Special []string

	kinds map[string]smolvm.ChangeKind
}

// Options of a [Scan].
type Options struct {
	// Since is the time after which changes on the host are conflicts.
	Since time.Time
	// Ignore are directories, as paths in the one that is compared, that don't count as added: others
	// are mounted there.
	Ignore []string
}

// scan is a plan in the making.
type scan struct {
	Options
	root *os.Root
	plan Plan

	present map[string]bool // paths in the archive
	opaque  []string
	// replaced are directories of the guest in the place of something else of the host's.
	replaced map[string]bool
}

// Scan compares what a guest has changed with a directory of the host.
func Scan(ctx context.Context, archive Archive, root *os.Root, opts Options) (*Plan, error) {
	s := &scan{Options: opts, root: root, present: map[string]bool{}, replaced: map[string]bool{}, plan: Plan{kinds: map[string]smolvm.ChangeKind{}}}
	if err := archive.each(ctx, s.entry); err != nil {
		return nil, err
	}
	for _, dir := range s.opaque {
		if err := s.hidden(dir); err != nil {
			return nil, err
		}
	}
	for name, kind := range s.plan.kinds {
		s.plan.Changes = append(s.plan.Changes, smolvm.Change{Kind: kind, Path: name})
	}
	slices.SortFunc(s.plan.Changes, func(a, b smolvm.Change) int { return strings.Compare(a.Path, b.Path) })
	slices.Sort(s.plan.Conflicts)
	s.plan.Conflicts = slices.Compact(s.plan.Conflicts)
	return &s.plan, nil
}

// each calls do for each entry, with its path in the directory.
func (a Archive) each(ctx context.Context, do func(name string, header *tar.Header, content io.Reader) error) error {
	reader := tar.NewReader(io.NewSectionReader(a.File, 0, a.Size))
	var total int64
	for count := 0; ; count++ {
		header, err := reader.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read what the guest has changed: %w", err)
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case count >= maxEntries:
			return fmt.Errorf("the guest has changed more than %d files", maxEntries)
		}
		// Nothing expands: holes of sparse files would.
		if total += header.Size; total > a.Size {
			return fmt.Errorf("the guest's %q is larger than what it has sent", header.Name)
		}
		name, err := clean(header.Name)
		if err != nil {
			return err
		}
		if name == "." {
			continue
		}
		if err := do(name, header, reader); err != nil {
			return err
		}
	}
}

// clean returns a path of an archive as one in the directory.
func clean(name string) (string, error) {
	trimmed := strings.TrimSuffix(strings.TrimPrefix(name, "./"), "/")
	if trimmed == "" || trimmed == "." {
		return ".", nil
	}
	if !fs.ValidPath(trimmed) && !validBytes(trimmed) || len(trimmed) > maxPath || strings.ContainsRune(trimmed, 0) {
		return "", fmt.Errorf("the guest sends %q, which is no path in the directory", name[:min(len(name), 100)])
	}
	return trimmed, nil
}

// validBytes is [fs.ValidPath] for names that are not UTF-8.
func validBytes(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return true
}

// entry looks at one entry of the archive.
func (s *scan) entry(name string, header *tar.Header, content io.Reader) error {
	dir, base := path.Split(name)
	within := s.replaced[path.Clean(dir)]
	deleted, isWhiteout := strings.CutPrefix(base, ocitar.Whiteout)
	switch {
	case isWhiteout && within:
		return nil // nothing of the host's is there
	case base == ocitar.Opaque:
		s.opaque = append(s.opaque, path.Clean(dir))
		return nil
	case isWhiteout && !validBytes(deleted):
		return fmt.Errorf("the guest deletes %q, which is no name", deleted)
	case isWhiteout:
		return s.deleted(dir + deleted)
	}
	s.present[name] = true
	var there fs.FileInfo
	err := fs.ErrNotExist
	if !within {
		there, err = s.root.Lstat(name)
	}
	if header.Typeflag == tar.TypeDir && (within || err == nil && !there.IsDir()) {
		s.replaced[name] = true
	}
	if isMissing(err) && header.Typeflag == tar.TypeDir && slices.Contains(s.Ignore, name) {
		return nil
	}
	if isMissing(err) {
		return s.note(name, smolvm.ChangeAdded, header, nil)
	}
	if err != nil {
		return err
	}
	same, err := s.same(name, there, header, content)
	if err != nil || same {
		return err
	}
	return s.note(name, smolvm.ChangeChanged, header, there)
}

// isMissing reports whether there is nothing at a path: its parent may be no directory any more.
func isMissing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// note notes a change of what is there on the host; nil: nothing is.
func (s *scan) note(name string, kind smolvm.ChangeKind, header *tar.Header, there fs.FileInfo) error {
	s.plan.kinds[name] = kind
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink:
	default:
		s.plan.Special = append(s.plan.Special, name)
	}
	// A directory that stays one loses nothing.
	if there == nil || there.IsDir() && header.Typeflag == tar.TypeDir {
		return nil
	}
	return s.conflicts(name)
}

// conflicts notes what has changed on the host at a path and below it.
func (s *scan) conflicts(name string) error {
	there, err := s.root.Lstat(name)
	if err != nil {
		return err
	}
	if !there.IsDir() { // a link would be followed
		s.conflict(name, there)
		return nil
	}
	return fs.WalkDir(s.root.FS(), name, func(at string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err == nil {
			s.conflict(at, info)
		}
		return err
	})
}

// conflict notes a path, if what is there has changed on the host.
func (s *scan) conflict(name string, there fs.FileInfo) {
	if stat, ok := there.Sys().(*syscall.Stat_t); ok && time.Unix(stat.Ctim.Unix()).After(s.Since) {
		s.plan.Conflicts = append(s.plan.Conflicts, name)
	}
}

func (s *scan) deleted(name string) error {
	if _, err := s.root.Lstat(name); err != nil {
		if isMissing(err) {
			return nil
		}
		return err
	}
	s.plan.kinds[name] = smolvm.ChangeDeleted
	return s.conflicts(name)
}

// hidden notes what a directory that the guest has made anew has no more.
func (s *scan) hidden(dir string) error {
	entries, err := fs.ReadDir(s.root.FS(), dir)
	if isMissing(err) {
		return nil
	}
	for _, entry := range entries {
		name := path.Join(dir, entry.Name())
		if s.present[name] {
			continue
		}
		if err := s.deleted(name); err != nil {
			return err
		}
	}
	return err
}

// same reports whether what is on the host is what the guest has.
func (s *scan) same(name string, there fs.FileInfo, header *tar.Header, content io.Reader) (bool, error) {
	perm := fs.FileMode(header.Mode & modeBits)
	switch header.Typeflag {
	case tar.TypeDir:
		return there.IsDir() && there.Mode().Perm() == perm, nil
	case tar.TypeSymlink:
		if there.Mode().Type() != fs.ModeSymlink {
			return false, nil
		}
		text, err := s.root.Readlink(name)
		return text == header.Linkname, err
	case tar.TypeLink:
		other, err := clean(header.Linkname)
		if err != nil {
			return false, err
		}
		linked, err := s.root.Lstat(other)
		return err == nil && os.SameFile(there, linked), nil
	case tar.TypeReg:
		if !there.Mode().IsRegular() || there.Mode().Perm() != perm || there.Size() != header.Size {
			return false, nil
		}
		return s.sameContent(name, content)
	}
	return false, nil
}

func (s *scan) sameContent(name string, content io.Reader) (bool, error) {
	file, err := s.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer func() { _ = file.Close() }()
	ours, theirs := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(content, theirs)
		m, ourErr := io.ReadFull(file, ours)
		if ourErr != nil && !errors.Is(ourErr, io.EOF) && !errors.Is(ourErr, io.ErrUnexpectedEOF) {
			return false, ourErr
		}
		if !bytes.Equal(theirs[:n], ours[:m]) {
			return false, nil
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return true, nil
		case err != nil:
			return false, err
		}
	}
}
