package store

import (
	"context"
	"database/sql"

	"github.com/smolvm/smolvm/internal/datadir"
)

// Bases are the records of which disk file is based on which. Paths are absolute.
type Bases struct{ s *Store }

// Bases returns the records of which disk file is based on which.
func (s *Store) Bases() Bases { return Bases{s} }

// Add writes down that a disk file is based on another, or is about to be.
func (b Bases) Add(ctx context.Context, path, base string) error {
	return b.s.update(ctx, func(tx *sql.Tx) error { return b.insert(ctx, tx, path, base) })
}

func (b Bases) insert(ctx context.Context, tx *sql.Tx, path, base string) error {
	_, err := tx.ExecContext(ctx, "INSERT OR IGNORE INTO bases (path, base) VALUES (?, ?)",
		file{b.s.root, &path}, file{b.s.root, &base})
	return err
}

// Persist is [Bases.Add] for a base that must survive a power cut once PersistBase
// has returned, with all that was written before.
func (b Bases) Persist(ctx context.Context, path, base string) error {
	return b.s.updateDurably(ctx, func(tx *sql.Tx) error {
		// A row that is there already may not be on the disk yet: what is not written is not
		// waited for.
		_, err := tx.ExecContext(ctx, "INSERT OR REPLACE INTO bases (path, base) VALUES (?, ?)",
			file{b.s.root, &path}, file{b.s.root, &base})
		return err
	})
}

// Remove takes back what [Bases.Add] has written down.
func (b Bases) Remove(ctx context.Context, path, base string) error {
	return b.s.update(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM bases WHERE path = ? AND base = ?",
			file{b.s.root, &path}, file{b.s.root, &base})
		return err
	})
}

// On returns the disk files that are written down as based on a file.
func (b Bases) On(ctx context.Context, base string) ([]string, error) {
	paths, err := b.s.texts(ctx, "SELECT path FROM bases WHERE base = ?", file{b.s.root, &base})
	for i := range paths {
		paths[i] = datadir.Abs(b.s.root, paths[i])
	}
	return paths, err
}

// IsDisk reports whether a file is the disk of a VM.
func (b Bases) IsDisk(ctx context.Context, path string) (bool, error) {
	var count int
	err := b.s.view(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, "SELECT count(*) FROM vms WHERE disk_path = ?", file{b.s.root, &path}).Scan(&count)
	})
	return count > 0, err
}

// IsBased reports whether a disk file is written down as based on another. Only disks that
// this data directory has made are.
func (b Bases) IsBased(ctx context.Context, path string) (bool, error) {
	var count int
	err := b.s.view(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, "SELECT count(*) FROM bases WHERE path = ?", file{b.s.root, &path}).Scan(&count)
	})
	return count > 0, err
}
