package ocistore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/step"
)

// Tag has another name mean an image too.
func (s *Store) Tag(ctx context.Context, image Image, ref ociref.Ref) error {
	release, err := s.share(ctx)
	if err != nil {
		return err
	}
	defer release()
	if _, err := s.readDocument(image.Digest); err != nil {
		return fmt.Errorf("tag %s: %w", ref, err)
	}
	image.Name = ref.String()
	return s.name(ctx, image)
}

// Remove removes a name, and what no other name leads to, unless something is being added or
// read just now: then a later [Store.Prune] does that. The error matches
// [smolvm.ErrImageNotFound].
func (s *Store) Remove(ctx context.Context, ref ociref.Ref) error {
	err := os.Remove(s.path(namesDir, nameFile(ref.String())))
	if errors.Is(err, fs.ErrNotExist) {
		return notFound(ref)
	}
	if err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	step.Reached(ctx, "image rm/unnamed")
	file, err := s.openLock()
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	if err := flock.TryLock(file); errors.Is(err, flock.ErrLocked) {
		return nil
	} else if err != nil {
		return err
	}
	_, err = s.collect(ctx, false)
	return err
}

// Prune removes blobs that no name leads to, what is kept for builds, and what pulls and imports that were cut off have
// left. It waits for those that are under way. It returns how many bytes it has removed.
func (s *Store) Prune(ctx context.Context) (removed int64, err error) {
	if _, err := os.Stat(s.dir); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	file, err := s.openLock()
	if err != nil {
		return 0, err
	}
	if err := flock.Lock(ctx, file); err != nil {
		return 0, fmt.Errorf("wait for those who use OCI images: %w", err)
	}
	defer func() { _ = file.Close() }()
	return s.collect(ctx, true)
}

// collect removes what no name leads to, and with that what was not finished if asked. The
// store's lock is held.
func (s *Store) collect(ctx context.Context, unfinished bool) (removed int64, err error) {
	if unfinished {
		if removed, err = removeAll(ctx, s.path(cacheDir), func(string) bool { return false }); err != nil {
			return removed, err
		}
	}
	used, err := s.used()
	if err != nil {
		return 0, err
	}
	blobs, err := removeAll(ctx, s.path("blobs", algorithm), func(name string) bool { return used[digestPrefix+name] })
	removed += blobs
	if !unfinished {
		return removed, err
	}
	for _, dir := range []string{partialDir, spoolDir} {
		more, dirErr := removeAll(ctx, s.path(dir), func(string) bool { return false })
		removed, err = removed+more, errors.Join(err, dirErr)
	}
	more, dirErr := removeAll(ctx, s.path(namesDir), func(name string) bool { return !strings.HasPrefix(name, ".new-") })
	return removed + more, errors.Join(err, dirErr)
}

// used returns the digests that names lead to. It fails rather than to miss one.
func (s *Store) used() (map[string]bool, error) {
	records, err := s.names()
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, record := range records {
		used[record.Digest] = true
		text, err := s.readDocument(record.Digest)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its image is damaged: without a manifest nothing of it can be used
		}
		if err != nil {
			return nil, damaged(record, err)
		}
		image, parts, err := s.parse(text)
		if err != nil {
			return nil, damaged(record, err)
		}
		used[image.Config] = true
		for _, part := range parts {
			used[part.Digest.String()] = true
		}
	}
	return used, s.useCached(used)
}

// removeAll removes the files and directories in a directory that are not kept.
func removeAll(ctx context.Context, dir string, keep func(name string) bool) (removed int64, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer func() { _ = root.Close() }()
	for _, entry := range entries {
		if keep(entry.Name()) {
			continue
		}
		if ctx.Err() != nil {
			return removed, context.Cause(ctx)
		}
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() {
			removed += info.Size()
		}
		if err := root.RemoveAll(entry.Name()); err != nil {
			return removed, fmt.Errorf("remove what no image needs: %w", err)
		}
		step.Reached(ctx, "image rm/blob removed")
	}
	return removed, nil
}
