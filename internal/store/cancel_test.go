package store

import (
	"context"
	"database/sql"
	"errors"
	"testing"
)

// A call that is given up in the middle of a transaction fails with the reason why it was,
// and not with what the database says of a transaction that has ended.
func TestGivenUpInTransaction(t *testing.T) {
	s := openTemp(t, Options{})
	why := errors.New("nobody waits any more")
	ctx, cancel := context.WithCancelCause(t.Context())
	err := s.update(ctx, func(tx *sql.Tx) error {
		cancel(why)
		for {
			if _, err := tx.Exec("SELECT 1"); err != nil { // until it has been rolled back
				return err
			}
		}
	})
	if !errors.Is(err, why) {
		t.Errorf("error %v, want %v", err, why)
	}
}
