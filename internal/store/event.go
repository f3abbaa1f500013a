package store

import (
	"context"
	"database/sql"
	"slices"

	"github.com/smolvm/smolvm"
)

// keptEvents is how many events are kept; older ones are dropped, so that the
// database of a host that runs VMs by the thousand does not grow for ever.
const keptEvents = 100_000

// Events are the records of what happened.
type Events struct{ s *Store }

// Events returns the records of what happened.
func (s *Store) Events() Events { return Events{s} }

// Add writes down that something happened. The event's ID is chosen by the
// database; a zero time means now.
func (e Events) Add(ctx context.Context, event smolvm.Event) error {
	if event.At.IsZero() {
		event.At = e.s.opts.Now()
	}
	return e.s.update(ctx, func(tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx,
			"INSERT INTO events (vm_id, actor, action, at, duration_ns, detail) VALUES (?, ?, ?, ?, ?, ?)",
			event.VMID, event.Actor, event.Action, moment{&event.At}, int64(event.Duration), event.Detail)
		if err != nil {
			return err
		}
		id, err := result.LastInsertId()
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "DELETE FROM events WHERE id <= ?", id-keptEvents)
		return err
	})
}

// Newest reads the newest events of a VM, or of all if the id is empty, the newest
// last. A limit of zero or less means all of them.
func (e Events) Newest(ctx context.Context, vmID string, limit int) ([]smolvm.Event, error) {
	query, args := "SELECT id, vm_id, actor, action, at, duration_ns, detail FROM events", []any(nil)
	if vmID != "" {
		query, args = query+" WHERE vm_id = ?", []any{vmID}
	}
	query += " ORDER BY id DESC"
	if limit > 0 {
		query, args = query+" LIMIT ?", append(args, limit)
	}
	events, err := e.query(ctx, query, args...)
	slices.Reverse(events)
	return events, err
}

// After reads the oldest events, at most limit, whose id is larger than one, of a VM or
// of all if the id is empty; the newest last.
func (e Events) After(ctx context.Context, vmID string, after int64, limit int) ([]smolvm.Event, error) {
	query, args := "SELECT id, vm_id, actor, action, at, duration_ns, detail FROM events WHERE id > ?", []any{after}
	if vmID != "" {
		query, args = query+" AND vm_id = ?", append(args, vmID)
	}
	return e.query(ctx, query+" ORDER BY id LIMIT ?", append(args, limit)...)
}

// Last returns the id of the newest event; zero if there is none.
func (e Events) Last(ctx context.Context) (int64, error) {
	var last int64
	err := e.s.view(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, "SELECT coalesce(max(id), 0) FROM events").Scan(&last)
	})
	return last, err
}

func (e Events) query(ctx context.Context, query string, args ...any) ([]smolvm.Event, error) {
	var events []smolvm.Event
	err := e.s.view(ctx, func(tx *sql.Tx) error {
		rows, err := tx.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			var one smolvm.Event
			if err := rows.Scan(&one.ID, &one.VMID, &one.Actor, &one.Action, moment{&one.At}, (*int64)(&one.Duration), &one.Detail); err != nil {
				return err
			}
			events = append(events, one)
		}
		return rows.Err()
	})
	return events, err
}
