// Package teardown is what follows the end of a VM: the end is written down, and what
// belonged to a VM that is deleted is removed. The VM's shim does that in its last moments,
// and a manager for a VM that does not run.
package teardown

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
)

// Site is a data directory with its books, for those who write down how its VMs ended.
type Site struct {
	Dir   *datadir.Dir
	Store *store.Store
	Disks *backing.Disks
	// Actor names this process in events.
	Actor string
}

// errOther is why nothing is written down into a directory that is not the VM's.
var errOther = errors.New("the data directory was moved, and another one is in its place; the VM's own learns of its end when it is used next")

// open opens the data directory of a VM that has ended, for its shim. The database is opened
// only then: a shim has no use for it before. The directory may have been moved or removed
// meanwhile, and one that is there may be a copy, in which the VM never ran.
func open(ctx context.Context, dataDir string) (*Site, error) {
	dir, err := datadir.Open(datadir.Options{Path: dataDir, Existing: true})
	if err != nil {
		return nil, err
	}
	if dir.ID() == "" {
		return nil, fmt.Errorf("data directory %s: %w", dataDir, errOther)
	}
	state, err := store.Open(ctx, dir.Database(), store.Options{MakeRoom: dir.MakeRoom})
	if err != nil {
		return nil, err
	}
	return &Site{
		Dir:   dir,
		Store: state,
		Disks: backing.New(dir, state.Bases()),
		Actor: fmt.Sprintf("shim[%d]", os.Getpid()),
	}, nil
}

// visit opens the data directory of a VM for as long as do takes.
func visit(ctx context.Context, origin shim.Origin, do func(*Site) error) error {
	site, err := open(ctx, origin.DataDir)
	if err != nil {
		return err
	}
	return errors.Join(do(site), site.Store.Close())
}

// RecordExit writes down the end of a VM, in its shim's process, and deletes the VM if it is
// ephemeral.
func RecordExit(ctx context.Context, record shim.ExitRecord) error {
	return visit(ctx, record.Origin, func(s *Site) error { return s.recordExit(ctx, record) })
}

// RecordHalt writes down that a VMM has paused its guest, in the shim's process.
func RecordHalt(ctx context.Context, record shim.HaltRecord) error {
	return mark(ctx, record, smolvm.StatePaused, "paused")
}

// RecordReach writes down, in the shim's process, that the agent of a VM that runs can't be
// reached, or can be again.
func RecordReach(ctx context.Context, record shim.HaltRecord) error {
	return mark(ctx, record, smolvm.StateRunning, "unreachable")
}

// RecordHealth writes down, in the shim's process, that the status of a guest's health has changed.
func RecordHealth(ctx context.Context, record shim.HealthRecord) error {
	return visit(ctx, record.Origin, func(s *Site) error {
		began := time.Now()
		vm, err := s.Store.GetVM(ctx, record.ID)
		if err == nil && vm.Run == record.Run && vm.State.Alive() {
			var why string
			if record.Health.Status == smolvm.HealthUnhealthy {
				why = record.Health.Reason()
			}
			s.Note(ctx, record.ID, string(record.Health.Status), began, why)
		}
		return err
	})
}

// mark writes down the cause of a VM that is alive, and an event if that is something new.
func mark(ctx context.Context, record shim.HaltRecord, state smolvm.VMState, action string) error {
	return visit(ctx, record.Origin, func(s *Site) error {
		began := time.Now()
		changed, err := s.Store.MarkCause(ctx, record.ID, record.Run, state, record.Cause)
		if changed && record.Cause != "" {
			s.Note(ctx, record.ID, action, began, record.Cause)
		}
		return err
	})
}

func (s *Site) recordExit(ctx context.Context, record shim.ExitRecord) error {
	began := time.Now()
	state := smolvm.StateError
	switch before := record.Origin.State; {
	case !record.Committed && before != "":
		state = before // a start that was not confirmed has not been
	case record.Exit.Clean():
		state = smolvm.StateStopped
	}
	cause := record.Exit.String()
	changed, err := s.Store.MarkEnded(ctx, record.ID, record.Run, state, cause, record.Exit.At)
	if err != nil {
		return fmt.Errorf("record end of VM %q: %w", record.ID, err)
	}
	if changed {
		s.Note(ctx, record.ID, "exit", began, cause)
	}
	return s.EraseEphemeral(ctx, record.ID, record.RuntimeDir)
}

// EraseEphemeral deletes an ephemeral VM when it has ended. Whoever holds the VM's
// lock is just stopping or deleting it, and deletes it then; a start that is given
// up leaves it to us.
func (s *Site) EraseEphemeral(ctx context.Context, id, runtimeDir string) error {
	lock, err := s.Dir.TryLockVM(id)
	if errors.Is(err, datadir.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	vm, err := s.Store.GetVM(ctx, id)
	switch {
	case errors.Is(err, smolvm.ErrVMNotFound):
		lock.Remove()
		return nil
	case err != nil || !vm.Config.Ephemeral || vm.State.Alive():
		lock.Unlock()
		return err
	}
	if err := s.Erase(ctx, vm, runtimeDir); err != nil {
		lock.Unlock()
		return fmt.Errorf("delete ephemeral VM %q: %w", id, err)
	}
	lock.Remove()
	s.Note(ctx, id, "delete", time.Now(), "it is ephemeral")
	return nil
}

// Erase removes all that belongs to a VM that does not run; its lock is held. The row goes
// last: as long as anything is left, the VM is there to be deleted.
func (s *Site) Erase(ctx context.Context, vm store.VM, runtimeDir string) error {
	_ = os.Remove(s.Dir.Lock(datadir.OwnerLock(vm.ID)))
	leaves := false
	step.Reached(ctx, "erase/ended")
	if err := shim.RemoveRuntimeDir(runtimeDir); err != nil {
		return err
	}
	paths := []string{s.Dir.VM(vm.ID)}
	if !vm.Config.RetainDisk && vm.DiskPath != vm.Config.RootfsPath {
		paths = append(paths, vm.DiskPath)
		leaves = vm.Layer != "" || s.Disks.Leaves(vm.DiskPath)
		if err := disk.RemoveLeftovers(vm.DiskPath); err != nil {
			return err
		}
	}
	for _, path := range paths {
		if path == "" {
			continue
		}
		if err := os.RemoveAll(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		step.Reached(ctx, "erase/"+filepath.Base(filepath.Dir(path)))
	}
	if err := s.Store.DeleteVM(ctx, vm.ID); err != nil {
		return err
	}
	step.Reached(ctx, "erase/row")
	if leaves {
		s.Collect(ctx, vm.ID)
	}
	return nil
}

// Collect removes the layers that nothing needs any more, for an operation on a VM that is
// done, whatever comes of it: what is left is removed later, and a manager's Reconcile tells
// what is wrong.
func (s *Site) Collect(ctx context.Context, id string) {
	began := time.Now()
	if err := s.Disks.Collect(ctx); err != nil {
		s.Note(ctx, id, "collect-failed", began, err.Error())
	}
}

// Note records an event of a VM; without an id, of none. Errors are ignored: the operation has already succeeded, and the
// event log is best effort.
func (s *Site) Note(ctx context.Context, id, action string, began time.Time, detail string) {
	_ = s.Store.Events().Add(context.WithoutCancel(ctx), smolvm.Event{
		VMID:     id,
		Actor:    s.Actor,
		Action:   action,
		At:       began.UTC(),
		Duration: time.Since(began),
		Detail:   detail,
	})
}
