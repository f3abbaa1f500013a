package imagebuild

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/smolvm/smolvm/internal/flock"
)

// CacheDir keeps the content of cache mounts in a directory, as archives by the hashes of their
// ids. Any number of processes may use it. It implements [Caches].
type CacheDir string

func (d CacheDir) path(id, suffix string) string {
	return filepath.Join(string(d), digestOf([]byte(id))+suffix)
}

// OpenCache opens the archive of a cache; it is nil if there is none.
func (d CacheDir) OpenCache(id string) (io.ReadCloser, error) {
	file, err := os.Open(d.path(id, ".tar"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return file, nil
}

// SetCache replaces the archive of a cache. It appears whole, or not at all.
func (d CacheDir) SetCache(id string, write func(w io.Writer) error) error {
	temp, err := os.CreateTemp(string(d), ".new-*")
	if err != nil {
		return err
	}
	buffered := bufio.NewWriterSize(temp, 1<<20)
	err = errors.Join(write(buffered), buffered.Flush(), temp.Close())
	if err == nil {
		err = os.Rename(temp.Name(), d.path(id, ".tar"))
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	return nil
}

// LockCache keeps others from a cache.
func (d CacheDir) LockCache(ctx context.Context, id string) (unlock func(), err error) {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return nil, err
	}
	if unlock, err = flock.At(ctx, d.path(id, ".lock")); err != nil {
		return nil, fmt.Errorf("wait for cache %q: %w", id, err)
	}
	return unlock, nil
}
