package imagebuild

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/imagebuild/files"
)

// Bounds of what one instruction copies.
const (
	maxEntries = 1_000_000
	maxBytes   = 64 << 30
)

// selection is what one source of a copy stands for.
type selection struct {
	// base is its last name, which a file has in a directory that it is copied to.
	base string
	// items are the file, or the directory with all that is in it, in order.
	items []item
}

// item is a file that is copied.
type item struct {
	// name is its path in the directory that is copied; empty for that itself.
	name string
	file files.File
	open func() (io.ReadCloser, error)
	// sum is the hash of its content; nil if it was not read.
	sum []byte
}

// selector selects files.
type selector struct {
	tree    files.Tree
	exclude *files.Ignore
	entries int
	bytes   int64
}

// selectFiles finds what is copied.
func (b *builder) selectFiles(ctx context.Context, tree files.Tree, paths, exclude []string) ([]selection, error) {
	ignore, err := files.NewIgnore(exclude)
	if err != nil {
		return nil, fmt.Errorf("--exclude: %w", err)
	}
	s := &selector{tree: tree, exclude: ignore}
	var selected []selection
	for _, name := range paths {
		names := []string{name}
		if files.HasWildcard(name) {
			if names, err = files.Glob(tree, name); err != nil {
				return nil, fmt.Errorf("%q: %w", name, err)
			}
		}
		for _, one := range names {
			found, err := s.selectOne(ctx, one)
			if errors.Is(err, fs.ErrNotExist) {
				return nil, b.missing(tree, one)
			}
			if err != nil {
				return nil, err
			}
			if len(found.items) > 0 {
				selected = append(selected, found)
			}
		}
	}
	return selected, nil
}

// missing returns the error of a file that is not there.
func (b *builder) missing(tree files.Tree, name string) error {
	if tree != b.opts.Context {
		return fmt.Errorf("%q is not there to be copied", "/"+name)
	}
	err := fmt.Errorf("%q is not in the build's context", name)
	if b.opts.Ignored != nil && b.opts.Ignored(name) {
		return &smolvm.Error{Err: err, Hint: "its " + files.IgnoreFile + " excludes it"}
	}
	return err
}

// selectOne finds a file, or a directory with all that is in it. Links in its path are followed,
// those in it are not.
func (s *selector) selectOne(ctx context.Context, name string) (selection, error) {
	actual, file, err := files.Resolve(s.tree, name)
	if err != nil {
		return selection{}, err
	}
	found := selection{base: path.Base(name)}
	if !file.IsDir() {
		if excluded, err := s.exclude.Matches(found.base); err != nil || excluded {
			return found, err
		}
	}
	return found, s.walk(ctx, &found, actual, "", file)
}

// walk adds a file and all that is in it.
func (s *selector) walk(ctx context.Context, to *selection, actual, name string, file files.File) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.entries++
	if file.IsRegular() {
		s.bytes += file.Size
	}
	if s.entries > maxEntries || s.bytes > maxBytes {
		return fmt.Errorf("an instruction copies more than %d files, or %d GiB", maxEntries, maxBytes>>30)
	}
	to.items = append(to.items, item{name: name, file: file, open: func() (io.ReadCloser, error) { return s.tree.Open(actual) }})
	if !file.IsDir() {
		return nil
	}
	names, err := s.tree.Names(actual)
	if err != nil {
		return err
	}
	for _, child := range names {
		inside, at := path.Join(name, child), path.Join(actual, child)
		if excluded, err := s.exclude.Matches(inside); err != nil {
			return err
		} else if excluded {
			continue
		}
		file, err := s.tree.Lstat(at)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed meanwhile
		}
		if err == nil {
			err = s.walk(ctx, to, at, inside, file)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
