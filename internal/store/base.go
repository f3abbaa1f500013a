package store

import (
	"context"
	"database/sql"
	"errors"

	"github.com/smolvm/smolvm/internal/datadir"
)

// AddBase writes down that a disk file is based on another, or is about to be.
func (s *Store) AddBase(ctx context.Context, path, base string) error {
	return s.update(ctx, func(tx *sql.Tx) error { return s.insertBase(ctx, tx, path, base) })
}

func (s *Store) insertBase(ctx context.Context, tx *sql.Tx, path, base string) error {
	_, err := tx.ExecContext(ctx, "INSERT OR IGNORE INTO bases (path, base) VALUES (?, ?)",
		file{s.root, &path}, file{s.root, &base})
	return err
}

// PersistBase is [Store.AddBase] for a base that must survive a power cut once PersistBase
// has returned, with all that was written before.
func (s *Store) PersistBase(ctx context.Context, path, base string) error {
	return s.updateDurably(ctx, func(tx *sql.Tx) error {
		// A row that is there already may not be on the disk yet: what is not written is not
		// waited for.
		_, err := tx.ExecContext(ctx, "INSERT OR REPLACE INTO bases (path, base) VALUES (?, ?)",
			file{s.root, &path}, file{s.root, &base})
		return err
	})
}

// RemoveBase takes back what [Store.AddBase] has written down.
func (s *Store) RemoveBase(ctx context.Context, path, base string) error {
	return s.update(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM bases WHERE path = ? AND base = ?",
			file{s.root, &path}, file{s.root, &base})
		return err
	})
}

// BasedOn returns the disk files that are written down as based on a file.
func (s *Store) BasedOn(ctx context.Context, base string) ([]string, error) {
	paths, err := s.texts(ctx, "SELECT path FROM bases WHERE base = ?", file{s.root, &base})
	for i := range paths {
		paths[i] = datadir.Abs(s.root, paths[i])
	}
	return paths, err
}

// IsDisk reports whether a file is the disk of a VM.
func (s *Store) IsDisk(ctx context.Context, path string) (bool, error) {
	var count int
	err := s.view(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, "SELECT count(*) FROM vms WHERE disk_path = ?", file{s.root, &path}).Scan(&count)
	})
	return count > 0, err
}

// IsBased reports whether a disk file is written down as based on another. Only disks that
// this data directory has made are.
func (s *Store) IsBased(ctx context.Context, path string) (bool, error) {
	var count int
	err := s.view(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, "SELECT count(*) FROM bases WHERE path = ?", file{s.root, &path}).Scan(&count)
	})
	return count > 0, err
}

// FormerRoot returns the path at which the data directory was when its database had absolute
// paths in it; empty if it never had.
func (s *Store) FormerRoot(ctx context.Context) (string, error) {
	var root string
	err := s.view(ctx, func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, "SELECT root FROM former").Scan(&root)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		return err
	})
	return root, err
}

// ForgetRuns marks all VMs that are alive as stopped. It is for a database that was copied
// from another data directory, to which their processes belong.
func (s *Store) ForgetRuns(ctx context.Context, cause string) error {
	return s.update(ctx, func(tx *sql.Tx) error {
		now := s.opts.Now().UTC()
		_, err := tx.ExecContext(ctx, "UPDATE vms SET state = 'stopped', cause = ?, stopped_at = ? WHERE state IN ('running', 'paused')",
			cause, moment{&now})
		return err
	})
}
