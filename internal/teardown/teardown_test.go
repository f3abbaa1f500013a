package teardown

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

const run = "run-1"

// site is a data directory with a VM that runs.
type site struct {
	*testing.T
	dir     *datadir.Dir
	runtime string
}

func newSite(t *testing.T, ephemeral bool) *site {
	t.Helper()
	root := t.TempDir()
	dir, err := datadir.Open(datadir.Options{Path: filepath.Join(root, "data")})
	if err != nil {
		t.Fatal(err)
	}
	if err := dir.Settle(t.Context(), datadir.Arrival{Forget: func() error { return nil }}); err != nil {
		t.Fatal(err)
	}
	s := &site{T: t, dir: dir, runtime: filepath.Join(root, "run")}
	for _, path := range []string{s.runtime, dir.VM("vm")} {
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{dir.Disk("vm", "qcow2"), dir.Console("vm"), dir.Lock(datadir.OwnerLock("vm"))} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.withStore(func(ctx context.Context, state *store.Store) error {
		config := smolvm.VMConfig{ID: "vm", Ephemeral: ephemeral}.WithDefaults()
		_, err := state.CreateVM(ctx, store.NewVM{Config: config, Backend: "qemu", DiskPath: dir.Disk("vm", "qcow2"), LogPath: dir.Console("vm"), MachineID: strings.Repeat("0f", 16)})
		if err == nil {
			err = state.MarkStarted(ctx, "vm", store.Started{Run: run, At: time.Now()})
		}
		return err
	})
	return s
}

func (s *site) withStore(do func(context.Context, *store.Store) error) {
	s.Helper()
	state, err := store.Open(s.Context(), s.dir.Database(), store.Options{})
	if err != nil {
		s.Fatal(err)
	}
	if err := errors.Join(do(s.Context(), state), state.Close()); err != nil {
		s.Fatal(err)
	}
}

func (s *site) record(reason vmm.ExitReason, committed bool, before smolvm.VMState) error {
	return RecordExit(s.Context(), shim.ExitRecord{
		ID: "vm", Run: run, Exit: vmm.Exit{Reason: reason, At: time.Now()}, Committed: committed,
		Origin: shim.Origin{DataDir: s.dir.Root(), State: before}, RuntimeDir: s.runtime,
	})
}

// want fails the test unless the VM is in a state; if that is empty, unless all of it is gone.
func (s *site) want(state smolvm.VMState) {
	s.Helper()
	var vm store.VM
	s.withStore(func(ctx context.Context, books *store.Store) (err error) {
		if vm, err = books.GetVM(ctx, "vm"); errors.Is(err, smolvm.ErrVMNotFound) {
			return nil
		}
		return err
	})
	if vm.State != state {
		s.Errorf("state is %q, want %q", vm.State, state)
	}
	for _, path := range []string{s.runtime, s.dir.VM("vm"), s.dir.Disk("vm", "qcow2"), s.dir.Lock(datadir.OwnerLock("vm"))} {
		if _, err := os.Stat(path); (err == nil) != (state != "") {
			s.Errorf("%s: %v", path, err)
		}
	}
}

func TestRecordExit(t *testing.T) {
	for name, test := range map[string]struct {
		ephemeral, committed bool
		reason               vmm.ExitReason
		before, want         smolvm.VMState
	}{
		"power off":                    {committed: true, reason: vmm.ExitPowerOff, before: smolvm.StateCreated, want: smolvm.StateStopped},
		"crash":                        {committed: true, reason: vmm.ExitCrashed, before: smolvm.StateStopped, want: smolvm.StateError},
		"start that was not confirmed": {reason: vmm.ExitKilled, before: smolvm.StateCreated, want: smolvm.StateCreated},
		"ephemeral":                    {ephemeral: true, committed: true, reason: vmm.ExitKilled, before: smolvm.StateCreated},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, test.ephemeral)
			if err := s.record(test.reason, test.committed, test.before); err != nil {
				t.Fatal(err)
			}
			s.want(test.want)
			if err := s.record(vmm.ExitCrashed, true, ""); err != nil {
				t.Errorf("the end of a run that has ended: %v", err)
			}
			s.want(test.want)
		})
	}
}

// An ephemeral VM that somebody has locked is theirs to delete.
func TestRecordExitOfLockedVM(t *testing.T) {
	s := newSite(t, true)
	lock, err := s.dir.LockVM(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	if err := s.record(vmm.ExitKilled, true, smolvm.StateCreated); err != nil {
		t.Fatal(err)
	}
	s.want(smolvm.StateStopped)
}

// A copy that has taken the directory's place hears nothing of the end, and loses nothing.
func TestRecordExitIntoCopy(t *testing.T) {
	s := newSite(t, true)
	moved := s.dir.Root() + ".moved"
	if err := os.Rename(s.dir.Root(), moved); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(s.dir.Root(), os.DirFS(moved)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.dir.Root(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.record(vmm.ExitKilled, true, smolvm.StateCreated); !errors.Is(err, errOther) {
		t.Errorf("record the end: %v, want %v", err, errOther)
	}
	s.want(smolvm.StateRunning)
}

func TestRecordHalt(t *testing.T) {
	s := newSite(t, false)
	err := RecordHalt(t.Context(), shim.HaltRecord{ID: "vm", Run: run, Cause: "the disk is full", Origin: shim.Origin{DataDir: s.dir.Root()}})
	if err != nil {
		t.Fatal(err)
	}
	s.want(smolvm.StatePaused)
}
