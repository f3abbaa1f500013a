package warmpool

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
)

// Files of a slot.
const (
	slotConsole = "console.log"
	slotLog     = "shim.log"
	// slotFile is the slot's record. It has the name pendingFile until the slot's shim has
	// been told that it stays: up to then the shim ends with the process that fills the slot.
	slotFile    = "slot.json"
	pendingFile = "slot.pending"
)

// slotDisk returns the name of a slot's disk, by its format.
func slotDisk(format string) string { return "disk." + format }

// claimedSuffix ends the name of a slot's directory once it is being claimed. It has left
// the pool by then: if the claimer dies, what is left is removed by whoever fills the pool
// next, but never claimed by another.
const claimedSuffix = ".claimed"

// dismissTime is how long a shim that stands by may take to agree to its end, and to end.
const dismissTime = 2 * time.Second

// Slot is a VM of a pool that waits to be claimed.
type Slot struct {
	pools *Pools
	dir   string
	record
}

// record is what is kept of a slot.
type record struct {
	ShimPID   int    `json:"shim_pid"`
	ShimStart uint64 `json:"shim_start"`
	VMMPID    int    `json:"vmm_pid,omitempty"`
	VMMStart  uint64 `json:"vmm_start,omitempty"`
	BootID    string `json:"boot_id"`
}

// Slots returns the slots of a pool that can be claimed: their shims run.
func (p *Pools) Slots(id string) []Slot {
	paths, _ := glob.In(p.Dir.Pool(id), "*/"+slotFile)
	var alive []Slot
	for _, path := range paths {
		if strings.HasSuffix(filepath.Dir(path), claimedSuffix) {
			continue
		}
		if s, err := p.readSlot(filepath.Dir(path), slotFile); err == nil && s.alive() {
			alive = append(alive, s)
		}
	}
	return alive
}

func (p *Pools) readSlot(dir, file string) (Slot, error) {
	s := Slot{pools: p, dir: dir}
	text, err := os.ReadFile(filepath.Join(dir, file))
	if err == nil {
		err = json.Unmarshal(text, &s.record)
	}
	return s, err
}

// alive reports whether the slot's shim runs.
func (s Slot) alive() bool {
	return s.BootID == s.pools.HostBootID() && proc.Alive(s.ShimPID, s.ShimStart)
}

// runtimeDir is where the shim of a slot waits.
func (s Slot) runtimeDir() string {
	return s.pools.RuntimeDir("pool-" + strings.TrimSuffix(filepath.Base(s.dir), claimedSuffix))
}

// lock locks a slot, for the one that claims or removes it.
func (s Slot) lock() (*os.File, error) {
	file, err := os.Open(s.dir)
	if err != nil {
		return nil, err
	}
	if err := flock.TryLock(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// ErrTaken matches the error for a slot that somebody else has taken.
var ErrTaken = errors.New("somebody else claims it")

// Taken is a slot that has left its pool, for a VM.
type Taken struct {
	slot Slot
	file *os.File
}

// Take takes a slot out of its pool, so that whenever this process dies nobody else can claim
// it, nor take it for unused. The caller closes what it gets.
func (s Slot) Take(ctx context.Context) (*Taken, error) {
	file, err := s.lock()
	if err != nil {
		return nil, errors.Join(ErrTaken, err)
	}
	moved := s.dir + claimedSuffix
	if err := os.Rename(s.dir, moved); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	s.dir = moved
	step.Reached(ctx, "claim/moved")
	return &Taken{slot: s, file: file}, nil
}

// Close unlocks the slot.
func (t *Taken) Close() error { return t.file.Close() }

// DiskPath returns the path of the disk, which is of the format of the pool's kind.
func (t *Taken) DiskPath(format string) string { return filepath.Join(t.slot.dir, slotDisk(format)) }

// Files are the paths that the files of a slot get as those of a VM of the pool's kind.
type Files struct{ Disk, Console, VMMLog, ShimLog string }

// Slot returns the slot as its shim is told of it.
func (t *Taken) Slot(files Files) shim.Slot {
	return shim.Slot{
		StandbyDir: t.slot.runtimeDir(),
		Dir:        t.slot.dir,
		Names: map[string]string{
			slotDisk(disk.FormatOf(files.Disk)): files.Disk,
			slotConsole:                         files.Console,
			machine.VMMLog:                      files.VMMLog,
			slotLog:                             files.ShimLog,
		},
		Lock: t.file,
	}
}

// Discard removes a slot that could not be claimed, and ends its VM.
func (t *Taken) Discard(ctx context.Context) error { return t.slot.remove(ctx) }

// remove removes a slot, whose lock is held, and ends its shim if that still stands by.
func (s Slot) remove(ctx context.Context) error {
	idle, err := s.dismiss(ctx)
	if err != nil {
		return err
	}
	if idle {
		err = shim.RemoveRuntimeDir(s.runtimeDir())
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// dismiss ends the shim of a slot, unless it has been claimed: it is a VM's then, whatever
// the slot's file says. It reports whether the slot's shim is gone, and its VMM with it.
func (s Slot) dismiss(ctx context.Context) (gone bool, err error) {
	if s.ShimPID == 0 || !s.alive() {
		return true, nil
	}
	bounded, cancel := context.WithTimeout(ctx, dismissTime)
	defer cancel()
	err = shim.Dismiss(bounded, s.runtimeDir())
	if err == nil {
		// It removes what it has on the host. One that takes too long for that is killed.
		_ = proc.Wait(bounded, s.ShimPID, s.ShimStart)
	}
	if errors.Is(err, shim.ErrGone) {
		// It does not listen for claims any more: most likely it was claimed. But if no
		// VM has it, only its socket is gone.
		if claimed, err := s.claimed(ctx); err != nil || claimed {
			return false, err
		}
	}
	// One that listens but does not answer hangs, or is of an older program.
	bounded, cancelKill := context.WithTimeoutCause(ctx, proc.KillTime, proc.ErrUnkillable)
	defer cancelKill()
	if err := proc.Kill(bounded, s.ShimPID, s.ShimStart); err != nil {
		return true, err
	}
	return true, proc.Wait(bounded, s.VMMPID, s.VMMStart) // it ends after its shim
}

// claimed reports whether the shim of a slot is that of a VM.
func (s Slot) claimed(ctx context.Context) (bool, error) {
	vms, err := s.pools.Store.ListVMs(ctx, "")
	return slices.ContainsFunc(vms, func(vm store.VM) bool {
		return vm.State.Alive() && vm.ShimPID == s.ShimPID && vm.ShimStart == s.ShimStart
	}), err
}

// empty removes the slots of a pool: all, or only those whose VM has died. What is left of a
// slot whose claimer has died goes in either case. The pool's lock is held, so none is being
// made.
func (p *Pools) empty(ctx context.Context, id string, deadOnly bool) error {
	entries, err := os.ReadDir(p.Dir.Pool(id))
	if errors.Is(err, fs.ErrNotExist) { // who had the lock before found that the pool is to go
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		dir := filepath.Join(p.Dir.Pool(id), entry.Name())
		s, err := p.readSlot(dir, slotFile)
		if deadOnly && err == nil && s.alive() && !strings.HasSuffix(dir, claimedSuffix) {
			continue
		}
		if errors.Is(err, fs.ErrNotExist) {
			s, _ = p.readSlot(dir, pendingFile) // without one no shim was started, or it has ended
		}
		lock, err := s.lock()
		if err != nil {
			continue // somebody claims it, and removes it
		}
		errs = append(errs, s.remove(ctx), lock.Close())
	}
	return errors.Join(errs...)
}
