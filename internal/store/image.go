package store

import (
	"context"
	"database/sql"
)

// UsersOfImage returns the ids of the VMs that are made from the image of a digest,
// in alphabetical order.
func (s *Store) UsersOfImage(ctx context.Context, digest string) ([]string, error) {
	return s.texts(ctx, "SELECT id FROM vms WHERE image = ? ORDER BY id", digest)
}

// texts reads the only column of a query.
func (s *Store) texts(ctx context.Context, query string, args ...any) ([]string, error) {
	var texts []string
	err := s.view(ctx, func(tx *sql.Tx) error {
		rows, err := tx.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			var text string
			if err := rows.Scan(&text); err != nil {
				return err
			}
			texts = append(texts, text)
		}
		return rows.Err()
	})
	return texts, err
}
