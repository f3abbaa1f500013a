package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
)

// Started is what is to be kept of a start. The fields are as in [VM].
type Started struct {
	Run                 string
	PID, ShimPID        int
	PIDStart, ShimStart uint64
	BootID              string
	Accelerator         string
	At                  time.Time
}

// MarkStarted makes a VM that was created or stopped running. The error matches
// [smolvm.ErrVMNotFound], or [smolvm.ErrInvalidState] if the VM is in another state.
func (s *Store) MarkStarted(ctx context.Context, id string, started Started) error {
	return s.update(ctx, func(tx *sql.Tx) error {
		if err := requireState(ctx, tx, id, smolvm.StateCreated, smolvm.StateStopped); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `UPDATE vms SET state = ?, run = ?, pid = ?, pid_start = ?, shim_pid = ?,
			shim_start = ?, boot_id = ?, accelerator = ?, cause = NULL, started_at = ?, stopped_at = NULL WHERE id = ?`,
			string(smolvm.StateRunning), started.Run, started.PID, int64(started.PIDStart), started.ShimPID,
			int64(started.ShimStart), started.BootID, started.Accelerator, moment{&started.At}, id)
		return err
	})
}

// MarkEnded writes down the end of a run: the VM's new state, stopped or error, and
// why. It says whether that changed anything. It does not if the VM is not alive
// any more, or alive in another run, or deleted: the report is late then.
func (s *Store) MarkEnded(ctx context.Context, id, run string, state smolvm.VMState, cause string, at time.Time) (bool, error) {
	var changed bool
	err := s.update(ctx, func(tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx,
			"UPDATE vms SET state = ?, cause = ?, stopped_at = ? WHERE id = ? AND run = ? AND state IN (?, ?)",
			string(state), cause, moment{&at}, id, run, string(smolvm.StateRunning), string(smolvm.StatePaused))
		if err != nil {
			return err
		}
		n, err := result.RowsAffected()
		changed = n > 0
		return err
	})
	return changed && err == nil, err
}

// MarkFailed writes down that a start of a VM failed, and why. The error matches
// [smolvm.ErrVMNotFound].
func (s *Store) MarkFailed(ctx context.Context, id, cause string, at time.Time) error {
	return s.update(ctx, func(tx *sql.Tx) error {
		if _, err := stateOf(ctx, tx, id); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "UPDATE vms SET state = ?, cause = ?, stopped_at = ? WHERE id = ?",
			string(smolvm.StateError), cause, moment{&at}, id)
		return err
	})
}

// SetState moves a VM from one of some states to another. The error matches
// [smolvm.ErrVMNotFound], or [smolvm.ErrInvalidState] if the VM is in none of them.
func (s *Store) SetState(ctx context.Context, id string, from []smolvm.VMState, to smolvm.VMState) error {
	return s.update(ctx, func(tx *sql.Tx) error {
		if err := requireState(ctx, tx, id, from...); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "UPDATE vms SET state = ? WHERE id = ?", string(to), id)
		return err
	})
}

func requireState(ctx context.Context, tx *sql.Tx, id string, allowed ...smolvm.VMState) error {
	state, err := stateOf(ctx, tx, id)
	if err == nil && !slices.Contains(allowed, state) {
		err = fmt.Errorf("%w: VM %q is %s", smolvm.ErrInvalidState, id, state)
	}
	return err
}

func stateOf(ctx context.Context, tx *sql.Tx, id string) (smolvm.VMState, error) {
	var state string
	err := tx.QueryRowContext(ctx, "SELECT state FROM vms WHERE id = ?", id).Scan(&state)
	if errors.Is(err, sql.ErrNoRows) {
		return "", notFound(id)
	}
	return smolvm.VMState(state), err
}
