package distroimage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/image/distro"
)

// Prune removes the lists and packages that are kept for the next build, and returns how many bytes
// that freed. While an image is built of them nothing is removed.
func (i *Images) Prune() (freed int64, err error) {
	unlock, err := flock.TryAt(filepath.Join(i.Dir, distro.LockName))
	if errors.Is(err, flock.ErrLocked) || errors.Is(err, fs.ErrNotExist) {
		return 0, nil // an image is built, or none ever was
	}
	if err != nil {
		return 0, err
	}
	defer unlock()
	entries, err := os.ReadDir(i.Dir)
	if err != nil {
		return 0, err
	}
	for _, entry := range entries {
		if entry.Name() == distro.LockName { // others may wait for it
			continue
		}
		path := filepath.Join(i.Dir, entry.Name())
		bytes, err := sizeOf(path)
		if err == nil {
			err = os.RemoveAll(path)
		}
		if err != nil {
			return freed, fmt.Errorf("remove packages that are kept: %w", err)
		}
		freed += bytes
	}
	return freed, nil
}

// sizeOf returns the size of the files in a tree, in bytes.
func sizeOf(path string) (total int64, err error) {
	err = filepath.WalkDir(path, func(_ string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		if err == nil {
			total += info.Size()
		}
		return err
	})
	return total, err
}
