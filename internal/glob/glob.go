// Package glob finds files below a directory whose own name may hold any characters, also
// those that patterns give a meaning.
package glob

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// In returns the paths below dir that match a pattern of [fs.Glob]. What can't be read is
// left out, and so is all of a dir that is not there.
func In(dir, pattern string) ([]string, error) {
	names, err := fs.Glob(os.DirFS(dir), pattern)
	if err != nil {
		return nil, err
	}
	for i, name := range names {
		names[i] = filepath.Join(dir, name)
	}
	return names, nil
}

// Remove removes the files below dir that match a pattern of [fs.Glob].
func Remove(dir, pattern string) error {
	paths, err := In(dir, pattern)
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}
