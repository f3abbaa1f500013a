package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// IgnoreFile is the name of the file that says what is no part of a context.
const IgnoreFile = ".dockerignore"

// maxIgnoreSize is how long such a file may be, in bytes.
const maxIgnoreSize = 1 << 20

// opener opens files by name.
type opener interface {
	Open(name string) (io.ReadCloser, error)
}

// ReadSmall reads a file of a tree that has no more than so many bytes. Links are followed.
func ReadSmall(tree opener, name string, most int64) ([]byte, error) {
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
func ReadIgnore(tree opener, name string) (ignore *Ignore, there bool, err error) {
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

// Without is a tree without what is left out of it. It is a [Tree].
type Without struct {
	Tree
	Ignore *Ignore
}

// Lstat tells of a file.
func (w Without) Lstat(name string) (File, error) {
	if ignored, err := w.ignored(name); err != nil || ignored {
		return File{}, errors.Join(err, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist})
	}
	return w.Tree.Lstat(name)
}

// Names returns the names in a directory.
func (w Without) Names(name string) ([]string, error) {
	names, err := w.Tree.Names(name)
	if err != nil {
		return nil, err
	}
	left := []string{}
	for _, one := range names {
		ignored, err := w.ignored(path.Join(name, one))
		if err != nil {
			return nil, err
		}
		if !ignored {
			left = append(left, one)
		}
	}
	return left, nil
}

// ignored reports whether a file is left out, but not if something in it is not.
func (w Without) ignored(name string) (bool, error) {
	ignored, err := w.Ignore.Matches(name)
	if err != nil || !ignored {
		return false, err
	}
	if !w.Ignore.hasExceptions() {
		return true, nil
	}
	file, err := w.Tree.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !file.IsDir() {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	names, err := w.Tree.Names(name)
	if err != nil {
		return false, err
	}
	for _, one := range names {
		if ignored, err := w.ignored(path.Join(name, one)); err != nil || !ignored {
			return false, err
		}
	}
	return true, nil
}

func (i *Ignore) hasExceptions() bool { return i.matcher != nil && i.matcher.Exclusions() }
