package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/flock"
)

// Draft is a snapshot that is being made.
type Draft struct {
	// Disk is the name of the file with the guest's disk, see [DiskFile]; empty: it has none.
	Disk string

	store *Store
	name  string
	dir   string
	lock  *os.File // held for as long as somebody is at it
}

// Draft begins a snapshot. The error matches [smolvm.ErrAlreadyExists] if there is one of
// that name.
func (s *Store) Draft(name string) (*Draft, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if _, err := os.Lstat(filepath.Join(s.dir, name)); err == nil {
		return nil, fmt.Errorf("snapshot %q: %w", name, smolvm.ErrAlreadyExists)
	}
	dir, err := os.MkdirTemp(s.dir, draftPrefix+"*")
	if err != nil {
		return nil, fmt.Errorf("make snapshot %q: %w", name, err)
	}
	d := &Draft{store: s, name: name, dir: dir}
	if d.lock, err = os.Open(dir); err == nil {
		err = flock.TryLock(d.lock)
	}
	if err != nil {
		return nil, fmt.Errorf("make snapshot %q: %w", name, errors.Join(err, d.Discard()))
	}
	return d, nil
}

// Path returns the path of one of the draft's files.
func (d *Draft) Path(name string) string { return filepath.Join(d.dir, name) }

// Discard removes the files of the draft. After a Commit it does nothing.
func (d *Draft) Discard() error {
	if d.lock != nil {
		defer func() { _ = d.lock.Close() }()
	}
	return os.RemoveAll(d.dir)
}

// Commit makes the draft a snapshot: with the sums of its files, and all of it on disk.
func (d *Draft) Commit(ctx context.Context, meta any, bootID string) (Snapshot, error) {
	fail := func(err error) (Snapshot, error) {
		return Snapshot{}, fmt.Errorf("make snapshot %q: %w", d.name, errors.Join(err, d.Discard()))
	}
	text, err := json.Marshal(meta)
	if err != nil {
		return fail(err)
	}
	r := record{CreatedAt: time.Now().UTC(), Meta: text}
	checked := check{BootID: bootID, Files: map[string]stamp{}}
	for _, name := range []string{MemoryFile, StateFile, d.Disk} {
		if name == "" {
			continue
		}
		f := file{Name: name}
		if f.Sum, err = disk.Sum(ctx, d.Path(name)); err == nil {
			err = durable.Sync(d.Path(name))
		}
		if err != nil {
			return fail(err)
		}
		if checked.Files[name], err = stampOf(d.Path(name)); err != nil {
			return fail(err)
		}
		r.Files = append(r.Files, f)
	}
	checked.write(d.Path(checkedFile))
	if text, err = json.MarshalIndent(r, "", "  "); err == nil {
		err = os.WriteFile(d.Path(recordFile), text, 0o600)
	}
	if err == nil {
		err = errors.Join(durable.Sync(d.Path(recordFile)), durable.Sync(d.dir))
	}
	if err != nil {
		return fail(err)
	}
	// A directory that is there, and not empty, is not replaced.
	if err := os.Rename(d.dir, filepath.Join(d.store.dir, d.name)); err != nil {
		return fail(fmt.Errorf("%w: %w", smolvm.ErrAlreadyExists, err))
	}
	_ = d.lock.Close()
	if err := durable.Sync(d.store.dir); err != nil {
		return Snapshot{}, fmt.Errorf("make snapshot %q: %w", d.name, err)
	}
	return d.store.Get(d.name)
}

// Clean removes the files that killed processes have left.
func (s *Store) Clean() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("clean snapshots: %w", err)
	}
	var errs []error
	for _, entry := range entries {
		path := filepath.Join(s.dir, entry.Name())
		switch {
		case strings.HasPrefix(entry.Name(), trashPrefix):
			errs = append(errs, os.RemoveAll(path))
		case strings.HasPrefix(entry.Name(), draftPrefix):
			errs = append(errs, cleanDraft(path))
		}
	}
	return errors.Join(errs...)
}

func cleanDraft(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	defer func() { _ = dir.Close() }()
	if flock.TryLock(dir) != nil {
		return nil // somebody is at it
	}
	return os.RemoveAll(path)
}
