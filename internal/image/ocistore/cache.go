package ocistore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/smolvm/smolvm/internal/step"
)

// cacheDir holds, by the keys of steps of builds, the layers that they have led to.
const cacheDir = "build"

// CachedLayer is what a step of a build has led to.
type CachedLayer struct {
	// Layer is the layer that the step has made; the zero value if it has changed nothing.
	Layer Layer `json:"layer"`
	// CreatedAt is the time at which it was made.
	CreatedAt time.Time `json:"created_at"`
}

// Cached returns the layer that a step of a build has led to, by the step's key. It reports ok
// only if the layer is there.
func (s *Store) Cached(key string) (result CachedLayer, ok bool, err error) {
	name, err := cacheName(key)
	if err != nil {
		return CachedLayer{}, false, err
	}
	text, err := os.ReadFile(s.path(cacheDir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return CachedLayer{}, false, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &result)
	}
	if err != nil {
		return CachedLayer{}, false, fmt.Errorf("read cache of builds: %w", err)
	}
	if result.Layer.Digest == "" {
		return result, true, nil
	}
	digits, err := hexOf(result.Layer.Digest)
	if err != nil {
		return CachedLayer{}, false, fmt.Errorf("read cache of builds: %w", err)
	}
	return result, s.has(digits, result.Layer.Size), nil
}

// SetCached notes the layer that a step of a build has led to, by the step's key. As long as it is
// noted, the layer is not removed; [Store.Prune] forgets it.
func (s *Store) SetCached(ctx context.Context, key string, result CachedLayer) error {
	name, err := cacheName(key)
	if err != nil {
		return err
	}
	release, err := s.share(ctx)
	if err != nil {
		return err
	}
	defer release()
	text, err := json.Marshal(result)
	if err == nil {
		err = os.MkdirAll(s.path(cacheDir), 0o700)
	}
	if err == nil {
		err = s.writeFile(s.path(cacheDir), name, text)
	}
	if err != nil {
		return fmt.Errorf("write cache of builds: %w", err)
	}
	step.Reached(ctx, "image build/cached")
	return nil
}

// cacheName returns the name of the file of a key, which is 64 hexadecimal digits.
func cacheName(key string) (string, error) { return hexOf(digestPrefix + key) }

// useCached adds the layers that steps of builds have led to, to those that are used. What can't
// be read leads to none.
func (s *Store) useCached(used map[string]bool) error {
	entries, err := os.ReadDir(s.path(cacheDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".") {
			continue // being written
		}
		if result, ok, err := s.Cached(entry.Name()); err == nil && ok {
			used[result.Layer.Digest] = true
		}
	}
	return nil
}
