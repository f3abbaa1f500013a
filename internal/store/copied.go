package store

import (
	"context"
	"database/sql"
	"errors"
)

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
