package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/smolvm/smolvm"
)

// Started holds the data that is kept of a start. The fields are as in [VM].
type Started struct {
	Run                 string
	PID, ShimPID        int
	PIDStart, ShimStart uint64
	BootID              string
	Accelerator         string
	At                  time.Time
	Report              smolvm.StartReport
	Identity            Identity
}

// Identity holds the values that must be unique to each guest. Empty ones are unknown.
type Identity struct{ BootID, Random, MachineID, HostKey, MAC string }

// ErrDuplicateIdentity reports that another VM has a part of a guest's identity.
var ErrDuplicateIdentity = errors.New("another VM has the same identity")

// MarkStarted marks a VM as running that was not alive. The error matches
// [smolvm.ErrVMNotFound], or [smolvm.ErrInvalidState] if the VM is alive, or
// [ErrDuplicateIdentity].
func (s *Store) MarkStarted(ctx context.Context, id string, started Started) error {
	// Durably, and its creation with it: from now on the guest has data.
	return s.updateDurably(ctx, func(tx *sql.Tx) error {
		if err := requireState(ctx, tx, id, smolvm.StateCreated, smolvm.StateStopped, smolvm.StateError); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `UPDATE vms SET state = ?, run = ?, pid = ?, pid_start = ?, shim_pid = ?,
			shim_start = ?, boot_id = ?, accelerator = ?, cause = NULL, started_at = ?, stopped_at = NULL, failed_at = NULL WHERE id = ?`,
			string(smolvm.StateRunning), started.Run, started.PID, int64(started.PIDStart), started.ShimPID,
			int64(started.ShimStart), started.BootID, started.Accelerator, moment{&started.At}, id)
		if err != nil {
			return err
		}
		return insertStart(ctx, tx, id, started)
	})
}

func insertStart(ctx context.Context, tx *sql.Tx, id string, started Started) error {
	report, err := json.Marshal(started.Report)
	if err != nil {
		return err
	}
	who := started.Identity
	_, err = tx.ExecContext(ctx, `INSERT INTO starts (vm, report, boot_uuid, random, machine_id, host_key, mac)
		SELECT seq, ?, ?, ?, ?, ?, ? FROM vms WHERE id = ?
		ON CONFLICT (vm) DO UPDATE SET report = excluded.report, boot_uuid = excluded.boot_uuid, random = excluded.random,
			machine_id = excluded.machine_id, host_key = excluded.host_key, mac = excluded.mac`,
		string(report), text[string]{&who.BootID}, text[string]{&who.Random}, text[string]{&who.MachineID},
		text[string]{&who.HostKey}, text[string]{&who.MAC}, id)
	if sqliteErr, ok := errors.AsType[*sqlite.Error](err); ok && sqliteErr.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE {
		return fmt.Errorf("VM %q: %w: %w", id, ErrDuplicateIdentity, err)
	}
	return err
}

// Report returns how a VM was last started; nil if it never was.
func (s *Store) Report(ctx context.Context, id string) (*smolvm.StartReport, error) {
	var found *smolvm.StartReport
	err := s.query(ctx, "SELECT report FROM starts JOIN vms ON vm = seq WHERE id = ?", func(rows *sql.Rows) error {
		found = nil
		if !rows.Next() {
			return rows.Err()
		}
		var report sql.RawBytes
		if err := rows.Scan(&report); err != nil {
			return err
		}
		found = new(smolvm.StartReport)
		return json.Unmarshal(report, found)
	}, id)
	return found, err
}

// MarkEnded writes down the end of a run: the VM's new state, stopped or error, and
// why. It reports whether that changed anything. It does not if the VM is not alive
// any more, or alive in another run, or deleted: the report is late then.
func (s *Store) MarkEnded(ctx context.Context, id, run string, state smolvm.VMState, cause string, at time.Time) (bool, error) {
	var changed bool
	err := s.update(ctx, func(tx *sql.Tx) error {
		var failed time.Time
		if state == smolvm.StateError {
			failed = at
		}
		result, err := tx.ExecContext(ctx,
			"UPDATE vms SET state = ?, cause = ?, stopped_at = ?, failed_at = ? WHERE id = ? AND run = ? AND state IN (?, ?)",
			string(state), cause, moment{&at}, moment{&failed}, id, run, string(smolvm.StateRunning), string(smolvm.StatePaused))
		if err != nil {
			return err
		}
		n, err := result.RowsAffected()
		changed = n > 0
		return err
	})
	return changed && err == nil, err
}

// TakeFailed returns the ids of the VMs whose runs have ended in error since its last call and
// that are still in that state, in the order in which the VMs were created.
func (s *Store) TakeFailed(ctx context.Context) ([]string, error) {
	const failed = " FROM vms WHERE failed_at IS NOT NULL AND state = ?"
	var ids []string
	err := s.update(ctx, func(tx *sql.Tx) error {
		rows, err := tx.QueryContext(ctx, "SELECT id"+failed+" ORDER BY seq", string(smolvm.StateError))
		if err != nil {
			return err
		}
		defer func() { _ = rows.Close() }()
		ids = nil
		for rows.Next() {
			var id string
			if err := rows.Scan(&id); err != nil {
				return err
			}
			ids = append(ids, id)
		}
		if err := rows.Err(); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "UPDATE vms SET failed_at = NULL WHERE failed_at IS NOT NULL")
		return err
	})
	return ids, err
}

// MarkNotStarted writes down why a start failed before its guest ran. The VM stays in the
// state in which it was before. The error matches [smolvm.ErrVMNotFound].
func (s *Store) MarkNotStarted(ctx context.Context, id string, state smolvm.VMState, cause string) error {
	return s.update(ctx, func(tx *sql.Tx) error {
		if _, err := stateOf(ctx, tx, id); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "UPDATE vms SET state = ?, cause = ? WHERE id = ?", string(state), cause, id)
		return err
	})
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

// SetConfig replaces the configuration of a VM except for its id, image, backend and ports,
// which decide which VM it is, and with it the revision of the egress policy. It is written
// out at once: after a power cut no policy of before is in force. The error matches
// [smolvm.ErrVMNotFound].
func (s *Store) SetConfig(ctx context.Context, vm VM) error {
	return s.updateDurably(ctx, func(tx *sql.Tx) error {
		vms, err := s.selectVMs(ctx, tx, 1, "WHERE id = ?", vm.ID)
		if err != nil {
			return err
		}
		if len(vms) == 0 {
			return notFound(vm.ID)
		}
		vms[0].Config = vm.Config
		options, err := packOptions(vms[0])
		if err == nil {
			_, err = tx.ExecContext(ctx, "UPDATE vms SET vcpus = ?, memory_mib = ?, options = ?, egress_revision = ? WHERE id = ?",
				vm.Config.VCPUs, vm.Config.MemoryMiB, text[string]{&options}, number[int64]{&vm.EgressRevision}, vm.ID)
		}
		return err
	})
}

// MarkCause writes down, of a VM that is alive in a run, why its VMM has paused it by itself
// ([smolvm.StatePaused], which it is then), or why the agent of one that runs can't be reached
// ([smolvm.StateRunning]; empty: it can). It reports whether that changed anything; it does not
// if the VM is not alive in that run any more.
func (s *Store) MarkCause(ctx context.Context, id, run string, state smolvm.VMState, cause string) (bool, error) {
	if state == smolvm.StateRunning {
		return s.changes(ctx, "UPDATE vms SET cause = ? WHERE id = ? AND run = ? AND state = ? AND cause IS NOT ?",
			text[string]{&cause}, id, run, string(state), text[string]{&cause})
	}
	return s.changes(ctx, "UPDATE vms SET state = ?, cause = ? WHERE id = ? AND run = ? AND state IN (?, ?)",
		string(state), cause, id, run, string(smolvm.StateRunning), string(smolvm.StatePaused))
}

// changes makes an update, and reports whether it changed a row.
func (s *Store) changes(ctx context.Context, query string, args ...any) (bool, error) {
	var changed bool
	err := s.update(ctx, func(tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx, query, args...)
		if err != nil {
			return err
		}
		n, err := result.RowsAffected()
		changed = n > 0
		return err
	})
	return changed && err == nil, err
}

// SetState moves a VM from one of some states to another, and clears its cause. The error
// matches [smolvm.ErrVMNotFound], or [smolvm.ErrInvalidState] if the VM is in none of them.
func (s *Store) SetState(ctx context.Context, id string, from []smolvm.VMState, to smolvm.VMState) error {
	return s.update(ctx, func(tx *sql.Tx) error {
		if err := requireState(ctx, tx, id, from...); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "UPDATE vms SET state = ?, cause = NULL WHERE id = ?", string(to), id)
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
