package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

// A pool is a number of clones of one template that are held, each in a slot: a
// directory with its disk and logs, and a shim that stands by. A slot is no VM: it has no
// row, no lease and no identity. Starting a VM of the same kind claims one, which makes
// its shim and its files those of the VM.

// Files of a slot.
const (
	slotDisk    = "disk.qcow2"
	slotConsole = "console.log"
	slotFile    = "slot.json"
)

// claimedSuffix ends the name of a slot's directory once it is being claimed. It has left
// the pool by then: if the claimer dies, what is left is removed by whoever fills the pool
// next, but never claimed by another.
const claimedSuffix = ".claimed"

// fillers is how many slots are filled at once.
const fillers = 2

// slot is what is kept of one.
type slot struct {
	ShimPID   int    `json:"shim_pid"`
	ShimStart uint64 `json:"shim_start"`
	BootID    string `json:"boot_id"`

	dir string
}

// poolConfig returns the configuration of the VMs of a pool.
func poolConfig(o smolvm.PoolOptions) smolvm.VMConfig {
	return smolvm.VMConfig{
		ID: smolvm.NewID(), Image: o.Image, VCPUs: o.VCPUs, MemoryMiB: o.MemoryMiB, DiskSizeMiB: o.DiskSizeMiB, WarmUp: o.WarmUp,
	}.WithDefaults()
}

// SetPool keeps VMs of some kind ready, until [Manager.RemovePool]: a start of such a VM
// takes one of them, and has the next one made. It returns when all are ready. Each takes
// the memory of an idle VM.
func (m *Manager) SetPool(ctx context.Context, opts smolvm.PoolOptions) (smolvm.Pool, error) {
	id, err := m.definePool(ctx, opts)
	if err == nil {
		step.Reached(ctx, "pool/defined")
		_, err = m.runTask(ctx, task{Pool: id}, nil)
	}
	if err != nil {
		return smolvm.Pool{}, fmt.Errorf("fill pool: %w", err)
	}
	return m.poolInfo(ctx, id)
}

// EnsurePool is [Manager.SetPool] that returns as soon as it is written down what pool there
// is to be; its VMs are made in the background. [smolvm.Pool].Ready tells how many are there.
func (m *Manager) EnsurePool(ctx context.Context, opts smolvm.PoolOptions) (smolvm.Pool, error) {
	id, err := m.definePool(ctx, opts)
	if err == nil && len(m.slots(id)) < opts.Size {
		err = m.startTaskAside(task{Pool: id}, nil)
	}
	if err != nil {
		return smolvm.Pool{}, fmt.Errorf("ensure pool: %w", err)
	}
	return m.poolInfo(ctx, id)
}

// definePool writes down what pool there is to be.
func (m *Manager) definePool(ctx context.Context, opts smolvm.PoolOptions) (string, error) {
	if opts.Size < 1 || opts.Size > maxPool {
		return "", &smolvm.ValidationError{Fields: []smolvm.FieldError{{Field: "size", Problem: fmt.Sprintf("%d is not between 1 and %d", opts.Size, maxPool)}}}
	}
	config := poolConfig(opts)
	r, err := m.recipeFor(ctx, config, opts.Progress)
	if err != nil {
		return "", err
	}
	config.Image = r.Image // whatever its name will mean
	return r.key(), m.store.SetPool(ctx, store.Pool{ID: r.key(), Size: opts.Size, Config: config})
}

// maxPool bounds a pool; a VM of the usual kind takes some 50 MB while it is ready.
const maxPool = 256

// Pools lists the pools.
func (m *Manager) Pools(ctx context.Context) ([]smolvm.Pool, error) {
	rows, err := m.store.Pools(ctx)
	if err != nil {
		return nil, fmt.Errorf("list pools: %w", err)
	}
	pools := make([]smolvm.Pool, 0, len(rows))
	for _, row := range rows {
		pool, err := m.poolInfo(ctx, row.ID)
		if err != nil {
			return nil, err
		}
		pools = append(pools, pool)
	}
	return pools, nil
}

func (m *Manager) poolInfo(ctx context.Context, id string) (smolvm.Pool, error) {
	row, err := m.store.GetPool(ctx, id)
	if err != nil {
		return smolvm.Pool{}, err
	}
	config := row.Config
	return smolvm.Pool{
		ID: id, Size: row.Size, Ready: len(m.slots(id)), Image: config.Image, VCPUs: config.VCPUs,
		MemoryMiB: config.MemoryMiB, DiskSizeMiB: config.DiskSizeMiB, WarmUp: config.WarmUp,
	}, nil
}

// RemovePool ends a pool, and the VMs in it that nobody has claimed. The error matches
// [smolvm.ErrPoolNotFound].
func (m *Manager) RemovePool(ctx context.Context, id string) error {
	if _, err := m.store.GetPool(ctx, id); err != nil {
		return &smolvm.Error{Op: "remove", Kind: "pool", Hint: "`smolvm pool ls` lists the pools", Err: err}
	}
	if err := m.store.DeletePool(ctx, id); err != nil {
		return err
	}
	step.Reached(ctx, "pool/row")
	lock, err := m.lockPool(ctx, id)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	return errors.Join(m.emptyPool(ctx, id, false), m.removePoolDir(id), m.reclaimLayers(ctx))
}

// removePoolDir removes the directory of a pool that is empty, unless a slot is being
// claimed.
func (m *Manager) removePoolDir(id string) error {
	dir := m.poolDir(id)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || slices.ContainsFunc(entries, fs.DirEntry.IsDir) {
		return err
	}
	return os.RemoveAll(dir)
}

func isMissing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

func (m *Manager) poolDir(id string) string { return m.dir.Pool(id) }

// lockPool makes the directory of a pool, and locks it. Whoever had it before may have
// removed it.
func (m *Manager) lockPool(ctx context.Context, id string) (*os.File, error) {
	path := filepath.Join(m.poolDir(id), ".lock")
	for {
		if err := os.MkdirAll(m.poolDir(id), 0o700); err != nil {
			return nil, fmt.Errorf("lock pool: %w", err)
		}
		lock, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed since
		}
		if err != nil {
			return nil, fmt.Errorf("lock pool: %w", err)
		}
		var ours fs.FileInfo
		if err = flock.Lock(ctx, lock); err == nil {
			ours, err = lock.Stat()
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock pool: %w", err), lock.Close())
		}
		if there, err := os.Stat(path); err == nil && os.SameFile(ours, there) {
			return lock, nil
		}
		_ = lock.Close()
	}
}

// slots returns the slots of a pool that can be claimed: their shims run.
func (m *Manager) slots(id string) []slot {
	paths, _ := glob.In(m.poolDir(id), "*/"+slotFile)
	var alive []slot
	for _, path := range paths {
		if strings.HasSuffix(filepath.Dir(path), claimedSuffix) {
			continue
		}
		if s, err := readSlot(path); err == nil && m.slotAlive(s) {
			alive = append(alive, s)
		}
	}
	return alive
}

func readSlot(path string) (slot, error) {
	s := slot{dir: filepath.Dir(path)}
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	return s, err
}

func (m *Manager) slotAlive(s slot) bool {
	return s.BootID == m.bootID() && proc.Alive(s.ShimPID, s.ShimStart)
}

// slotRuntimeDir is where the shim of a slot waits.
func (m *Manager) slotRuntimeDir(dir string) string {
	return m.runtimeDir("pool-" + strings.TrimSuffix(filepath.Base(dir), claimedSuffix))
}

// emptyPool removes the slots of a pool: all, or only those whose VM has died. What is left
// of a slot whose claimer has died goes in either case. The pool's lock is held, so none is
// being made.
func (m *Manager) emptyPool(ctx context.Context, id string, deadOnly bool) error {
	entries, err := os.ReadDir(m.poolDir(id))
	if errors.Is(err, fs.ErrNotExist) { // who had the lock before found that the pool is to go
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		dir := filepath.Join(m.poolDir(id), entry.Name())
		if !entry.IsDir() {
			continue
		}
		s, err := readSlot(filepath.Join(dir, slotFile))
		if deadOnly && err == nil && m.slotAlive(s) && !strings.HasSuffix(dir, claimedSuffix) {
			continue
		}
		lock, err := lockSlot(dir)
		if err != nil {
			continue // somebody claims it, and removes it
		}
		errs = append(errs, m.removeSlot(ctx, s, dir), lock.Close())
	}
	return errors.Join(errs...)
}

// removeSlot removes a slot, whose lock is held, and ends its shim if that still stands by.
func (m *Manager) removeSlot(ctx context.Context, s slot, dir string) error {
	idle, err := m.dismiss(ctx, s, dir)
	if err != nil {
		return err
	}
	if idle {
		err = shim.RemoveRuntimeDir(m.slotRuntimeDir(dir))
	}
	return errors.Join(err, os.RemoveAll(dir))
}

// dismiss ends the shim of a slot, unless it has been claimed: it is a VM's then, whatever
// the slot's file says. It reports whether the slot's shim is gone.
func (m *Manager) dismiss(ctx context.Context, s slot, dir string) (bool, error) {
	if s.ShimPID == 0 || !m.slotAlive(s) {
		return true, nil
	}
	bounded, cancel := context.WithTimeout(ctx, dismissTime)
	defer cancel()
	err := shim.Dismiss(bounded, m.slotRuntimeDir(dir))
	if errors.Is(err, shim.ErrGone) {
		// It does not listen for claims any more: most likely it was claimed. But if no
		// VM has it, only its socket is gone.
		if claimed, err := m.hasShim(ctx, s); err != nil || claimed {
			return false, err
		}
	}
	// One that listens but does not answer hangs, or is of an older program.
	bounded, cancelKill := context.WithTimeoutCause(ctx, killTime, errUnkillable)
	defer cancelKill()
	return true, proc.Kill(bounded, s.ShimPID, s.ShimStart)
}

// dismissTime is how long a shim may take to agree to its end.
const dismissTime = 2 * time.Second

// hasShim reports whether the shim of a slot is that of a VM.
func (m *Manager) hasShim(ctx context.Context, s slot) (bool, error) {
	vms, err := m.store.ListVMs(ctx, "")
	return slices.ContainsFunc(vms, func(vm store.VM) bool {
		return vm.State.Alive() && vm.ShimPID == s.ShimPID && vm.ShimStart == s.ShimStart
	}), err
}

// lockSlot is held by the one that claims or removes a slot.
func lockSlot(dir string) (*os.File, error) {
	file, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := flock.TryLock(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// fillPool makes a pool have as many VMs as it is to have.
func (m *Manager) fillPool(ctx context.Context, id string) error {
	// A pool that has been removed meanwhile gets no directory for its lock again, which
	// whoever looks what is left would see.
	if _, err := m.store.GetPool(ctx, id); errors.Is(err, smolvm.ErrPoolNotFound) && isMissing(m.poolDir(id)) {
		return nil
	}
	lock, err := m.lockPool(ctx, id)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	pool, err := m.store.GetPool(ctx, id)
	if errors.Is(err, smolvm.ErrPoolNotFound) {
		return errors.Join(m.emptyPool(ctx, id, false), m.removePoolDir(id))
	}
	if err != nil {
		return err
	}
	if err := m.emptyPool(ctx, id, true); err != nil {
		return err
	}
	config := pool.Config
	template, err := m.BuildTemplate(ctx, smolvm.TemplateOptions{
		Image: config.Image, VCPUs: config.VCPUs, MemoryMiB: config.MemoryMiB, DiskSizeMiB: config.DiskSizeMiB, WarmUp: config.WarmUp,
	})
	if err != nil {
		return err
	}
	found, err := m.templates.Get(template.ID)
	if err != nil {
		return err
	}
	var meta templateMeta
	if err := json.Unmarshal(found.Meta, &meta); err != nil {
		return err
	}
	missing := pool.Size - len(m.slots(id))
	if missing > 0 {
		if err := m.checkRoom(); err != nil {
			return err
		}
	}
	step.Reached(ctx, "fill/emptied")
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(fillers)
	for range missing {
		group.Go(func() error { return m.fillSlot(groupCtx, id, found, meta.Recipe) })
	}
	return group.Wait()
}

// fillSlot makes one VM that stands by.
func (m *Manager) fillSlot(ctx context.Context, id string, template snapshot.Snapshot, r recipe) (err error) {
	dir := filepath.Join(m.poolDir(id), newRun())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	diskPath := filepath.Join(dir, slotDisk)
	err = m.disks.Derive(ctx, backing.Overlay{Path: diskPath, Base: m.dir.Layer(template.Name), BaseFormat: disk.QCOW2})
	if err != nil {
		return err
	}
	step.Reached(ctx, "fill/disk")
	drive, err := m.ownDrive(diskPath)
	if err != nil {
		return err
	}
	spec, err := m.strangerSpec(shim.Spec{
		Backend: r.Hardware.Backend,
		VMM: vmm.Config{
			ID:          "pool-" + filepath.Base(dir),
			Accelerator: r.Hardware.Accelerator,
			VCPUs:       r.Hardware.VCPUs,
			MemoryMiB:   r.Hardware.MemoryMiB,
			Drives:      []vmm.Drive{drive},
			Channel:     true,
			ConsolePath: filepath.Join(dir, slotConsole),
			LogPath:     filepath.Join(dir, "vmm.log"),
			Restore:     &vmm.Restore{Memory: template.Path(snapshot.MemoryFile), State: template.Path(snapshot.StateFile)},
		},
		ReadyTimeout: bootTimeout(smolvm.StartOptions{}, r.Hardware.Accelerator),
		Standby:      true,
		RuntimeDir:   m.slotRuntimeDir(dir),
	})
	if err != nil {
		return err
	}
	if err := datadir.MakeRuntimeParent(spec.RuntimeDir); err != nil {
		return err
	}
	program, err := m.shimCommand()
	if err != nil {
		return err
	}
	launched, err := shim.Launch(ctx, shim.LaunchOptions{Program: program, Spec: spec, LogPath: filepath.Join(dir, "shim.log")})
	if err != nil {
		return err
	}
	step.Reached(ctx, "fill/launched")
	text, err := json.Marshal(slot{ShimPID: launched.PID, ShimStart: launched.Start, BootID: m.bootID()})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, slotFile), text, 0o600)
	}
	if err == nil {
		step.Reached(ctx, "fill/written")
		err = launched.Commit()
	}
	if err != nil {
		launched.Abort(context.WithoutCancel(ctx))
	}
	step.Reached(ctx, "fill/done")
	return err
}

// claim starts the VM by one that stands by, if there is one of its kind.
func (s *starting) claim(ctx context.Context) error {
	for _, candidate := range s.m.slots(s.recipe.key()) {
		lock, err := lockSlot(candidate.dir)
		if err != nil {
			continue // somebody else claims it
		}
		err = s.claimSlot(ctx, candidate, lock)
		_ = lock.Close()
		if s.started {
			return nil
		}
		if err := s.missed(ctx, smolvm.StartPool, s.recipe.key(), err); err != nil {
			return err
		}
	}
	return nil
}

// claimSlot makes a slot's shim that of the VM, and has the shim make its files the VM's.
// The slot leaves the pool first, so that whenever this process dies nobody else can take
// it, nor take it for unused.
func (s *starting) claimSlot(ctx context.Context, candidate slot, lock *os.File) error {
	dir := candidate.dir + claimedSuffix
	if err := os.Rename(candidate.dir, dir); err != nil {
		return err
	}
	step.Reached(ctx, "claim/moved")
	launch := s.launch
	launch.Spec.ReadyTimeout /= fastFraction
	launch.Spec.WarmUp = ""
	s.touched = true
	s.phase("disk")
	claimed := shim.Slot{
		StandbyDir: s.m.slotRuntimeDir(dir),
		Dir:        dir,
		Names: map[string]string{
			slotDisk:    s.vm.DiskPath,
			slotConsole: launch.Spec.VMM.ConsolePath,
			"vmm.log":   launch.Spec.VMM.LogPath,
			"shim.log":  launch.LogPath,
		},
		Lock: lock,
	}
	s.confirm = func(ctx context.Context, launched *shim.Launched) error {
		// No layer is collected while the disk moves, in the middle of a look for its users.
		unlock, err := s.m.disks.Lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
		if err := s.m.disks.Adopt(ctx, filepath.Join(dir, slotDisk), s.vm.DiskPath); err != nil {
			return err
		}
		return launched.Commit()
	}
	defer func() { s.confirm = nil }()
	err := s.attempt(ctx, launch, smolvm.StartPool, s.recipe.key(), func(ctx context.Context, opts shim.LaunchOptions) (*shim.Launched, error) {
		return shim.Claim(ctx, claimed, opts)
	})
	if err != nil {
		err = errors.Join(err, s.m.removeSlot(context.WithoutCancel(ctx), candidate, dir))
	}
	return err
}

// reconcilePools removes the slots whose VM has died, and those of pools that are no more.
func (m *Manager) reconcilePools(ctx context.Context) error {
	entries, err := os.ReadDir(m.dir.Pools())
	if err != nil {
		return fmt.Errorf("reconcile pools: %w", err)
	}
	var errs []error
	for _, entry := range entries {
		lock, err := os.OpenFile(filepath.Join(m.poolDir(entry.Name()), ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed since
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if flock.TryLock(lock) == nil {
			_, err := m.store.GetPool(ctx, entry.Name())
			gone := errors.Is(err, smolvm.ErrPoolNotFound)
			errs = append(errs, m.emptyPool(ctx, entry.Name(), !gone))
			if gone {
				errs = append(errs, m.removePoolDir(entry.Name()))
			}
		}
		_ = lock.Close()
	}
	return errors.Join(errs...)
}
