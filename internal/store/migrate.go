package store

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"

	sqlite3 "modernc.org/sqlite/lib"

	"github.com/smolvm/smolvm"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// migrations returns the migrations in their order, which is that of their names.
func migrations() ([]string, error) {
	names, err := fs.Glob(migrationFiles, "migrations/*.sql")
	if err != nil {
		return nil, fmt.Errorf("list migrations: %w", err)
	}
	var steps []string
	for _, name := range names {
		text, err := migrationFiles.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read migration: %w", err)
		}
		steps = append(steps, string(text))
	}
	return steps, nil
}

// migrate brings the database to the schema's newest version. It writes nothing
// to a database that is damaged or too new.
func (s *Store) migrate(ctx context.Context, steps []string) error {
	version, err := s.version(ctx, s.read, len(steps))
	if err != nil || version == len(steps) {
		return err
	}
	if err := enableWAL(ctx, s.write); err != nil {
		return err
	}
	return transact(ctx, s.write, nil, func(tx *sql.Tx) error {
		// Another process may have been quicker.
		version, err := s.version(ctx, tx, len(steps))
		if err != nil {
			return err
		}
		for i := version; i < len(steps); i++ {
			if _, err := tx.ExecContext(ctx, steps[i]); err != nil {
				return fmt.Errorf("migrate to version %d: %w", i+1, err)
			}
		}
		// A pragma takes no parameters.
		_, err = tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", len(steps)))
		return err
	})
}

// version reads the version of the database's schema.
func (s *Store) version(ctx context.Context, q querier, newest int) (int, error) {
	var version int
	if err := q.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return 0, err
	}
	if version > newest {
		return 0, fmt.Errorf("%w: %s has version %d, and this program knows versions up to %d; upgrade smolvm",
			smolvm.ErrDatabaseTooNew, s.path, version, newest)
	}
	return version, nil
}

// querier is a database or a transaction on it.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// enableWAL puts the database into WAL mode, in which it stays. If another process
// is about the same, SQLite gives up at once, whatever the busy timeout; but to
// begin a transaction it does wait.
func enableWAL(ctx context.Context, db *sql.DB) error {
	for {
		_, err := db.ExecContext(ctx, "PRAGMA journal_mode = WAL")
		if resultCode(err)&0xff != sqlite3.SQLITE_BUSY {
			return err
		}
		if err := transact(ctx, db, nil, func(*sql.Tx) error { return nil }); err != nil {
			return err
		}
	}
}
