// Package warmpool keeps VMs ready to be claimed.
//
// A pool is a number of clones of one template that are paused, each in a slot: a directory
// with its disk and logs, and a shim that stands by. A slot is no VM: it has no row, no lease
// and no identity. Starting a VM of the same kind claims one, which makes its shim and its
// files those of the VM.
package warmpool

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/budget"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/template"
	"github.com/smolvm/smolvm/internal/vmm"
)

// fillers is how many slots are filled at once.
const fillers = 2

// Pools are those of a data directory.
type Pools struct {
	Dir       *datadir.Dir
	Store     *store.Store
	Disks     *backing.Disks
	Machines  *machine.Builder
	Templates *template.Templates
	Budget    *budget.Budget
	// RuntimeDir returns the directory for the sockets of a shim.
	RuntimeDir func(id string) string
	// Program returns the program that serves as shim, with its arguments.
	Program func() ([]string, error)
	// HostBootID names the host's present boot; empty if that is not known.
	HostBootID func() string
	// EnsureTemplate returns a template, which it has made if there is none.
	EnsureTemplate func(ctx context.Context, opts smolvm.TemplateOptions) (smolvm.Template, error)
}

// Info returns what users get to see of a pool. The error matches [smolvm.ErrPoolNotFound].
func (p *Pools) Info(ctx context.Context, id string) (smolvm.Pool, error) {
	row, err := p.Store.Pools().Get(ctx, id)
	if err != nil {
		return smolvm.Pool{}, err
	}
	return p.info(row), nil
}

func (p *Pools) info(row store.Pool) smolvm.Pool {
	config := row.Config
	return smolvm.Pool{
		ID: row.ID, Size: row.Size, Ready: len(p.Slots(row.ID)), Image: config.Image, VCPUs: config.VCPUs,
		MemoryMiB: config.MemoryMiB, DiskSizeMiB: config.DiskSizeMiB, WarmUp: config.WarmUp,
		Network: cmp.Or(config.Network.Mode, smolvm.NetworkUser),
	}
}

// List returns the pools.
func (p *Pools) List(ctx context.Context) ([]smolvm.Pool, error) {
	rows, err := p.Store.Pools().List(ctx)
	if err != nil {
		return nil, err
	}
	pools := make([]smolvm.Pool, 0, len(rows))
	for _, row := range rows {
		pools = append(pools, p.info(row))
	}
	return pools, nil
}

// Remove ends a pool, and the VMs in it that nobody has claimed. The error matches
// [smolvm.ErrPoolNotFound].
func (p *Pools) Remove(ctx context.Context, id string) error {
	if _, err := p.Store.Pools().Get(ctx, id); err != nil {
		return &smolvm.Error{Op: "remove", Kind: "pool", Hint: "`smolvm pool ls` lists the pools", Err: err}
	}
	if err := p.Store.Pools().Delete(ctx, id); err != nil {
		return err
	}
	step.Reached(ctx, "pool/row")
	lock, err := p.lock(ctx, id)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	return errors.Join(p.empty(ctx, id, false), p.removeDir(id), p.Disks.Collect(ctx))
}

// removeDir removes the directory of a pool that is empty, unless a slot is being claimed.
func (p *Pools) removeDir(id string) error {
	dir := p.Dir.Pool(id)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || slices.ContainsFunc(entries, fs.DirEntry.IsDir) {
		return err
	}
	return os.RemoveAll(dir)
}

// lockName is the file of a pool's lock, in its directory.
const lockName = ".lock"

// lock makes the directory of a pool, and locks it. Whoever had it before may have removed
// it.
func (p *Pools) lock(ctx context.Context, id string) (*os.File, error) {
	path := filepath.Join(p.Dir.Pool(id), lockName)
	for {
		if err := os.MkdirAll(p.Dir.Pool(id), 0o700); err != nil {
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

// Fill makes a pool have as many VMs as it is to have, no fewer and no more, in a worker. A pool
// that is no more is emptied.
func (p *Pools) Fill(ctx context.Context, id string) error {
	if _, err := os.Stat(p.Dir.Pool(id)); errors.Is(err, fs.ErrNotExist) && p.removed(ctx, id) {
		return nil // the lock would make its directory again
	}
	lock, err := p.lock(ctx, id)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	pool, err := p.Store.Pools().Get(ctx, id)
	if errors.Is(err, smolvm.ErrPoolNotFound) {
		return errors.Join(p.empty(ctx, id, false), p.removeDir(id))
	}
	if err != nil {
		return err
	}
	if err := p.empty(ctx, id, true); err != nil {
		return err
	}
	if err := p.shrink(ctx, id, pool.Size); err != nil {
		return err
	}
	config := pool.Config
	made, err := p.EnsureTemplate(ctx, smolvm.TemplateOptions{
		Image: config.Image, VCPUs: config.VCPUs, MemoryMiB: config.MemoryMiB, DiskSizeMiB: config.DiskSizeMiB, WarmUp: config.WarmUp,
		Network: config.Network.Mode,
	})
	if err != nil {
		return err
	}
	from, kind, err := p.Templates.Open(made.ID)
	if err != nil {
		return err
	}
	missing := pool.Size - len(p.Slots(id))
	if missing > 0 {
		if err := p.Budget.Check(); err != nil {
			return err
		}
	}
	step.Reached(ctx, "fill/emptied")
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(fillers)
	for range missing {
		group.Go(func() error {
			if p.removed(groupCtx, id) {
				return nil
			}
			return p.fillSlot(groupCtx, id, from, kind)
		})
	}
	err = group.Wait()
	if ctx := context.WithoutCancel(ctx); p.removed(ctx, id) {
		// Whoever has removed it waits for the lock, or does not any more.
		return errors.Join(p.empty(ctx, id, false), p.removeDir(id))
	}
	return err
}

// shrink removes the VMs that a pool has beyond its size. One that is claimed meanwhile leaves
// the pool in that way. The pool's lock is held.
func (p *Pools) shrink(ctx context.Context, id string, size int) error {
	slots := p.Slots(id)
	var errs []error
	for _, s := range slots[:max(0, len(slots)-size)] {
		taken, err := s.Take(ctx)
		if errors.Is(err, ErrTaken) || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, taken.Discard(ctx), taken.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("make the pool smaller: %w", err)
	}
	return nil
}

// removed reports whether a pool is not to be any more.
func (p *Pools) removed(ctx context.Context, id string) bool {
	_, err := p.Store.Pools().Get(ctx, id)
	return errors.Is(err, smolvm.ErrPoolNotFound)
}

// fillSlot makes one VM that stands by.
func (p *Pools) fillSlot(ctx context.Context, id string, from snapshot.Snapshot, kind template.Kind) (err error) {
	s := Slot{pools: p, dir: filepath.Join(p.Dir.Pool(id), shim.NewRun())}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(s.dir))
		}
	}()
	spec, err := p.spec(ctx, s, from, kind)
	if err != nil {
		return err
	}
	program, err := p.Program()
	if err != nil {
		return err
	}
	launched, err := shim.Launch(ctx, shim.LaunchOptions{Program: program, Spec: spec, LogPath: filepath.Join(s.dir, slotLog)})
	if err != nil {
		return err
	}
	step.Reached(ctx, "fill/launched")
	text, err := json.Marshal(record{
		ShimPID: launched.PID, ShimStart: launched.Start, VMMPID: launched.VMMPID, VMMStart: launched.VMMStart, BootID: p.HostBootID(),
	})
	pending := filepath.Join(s.dir, pendingFile)
	if err == nil {
		err = os.WriteFile(pending, text, 0o600)
	}
	if err == nil {
		step.Reached(ctx, "fill/written")
		err = launched.Commit()
	}
	if err == nil {
		step.Reached(ctx, "fill/committed")
		err = os.Rename(pending, filepath.Join(s.dir, slotFile))
	}
	if err != nil {
		launched.Abort(context.WithoutCancel(ctx))
	}
	step.Reached(ctx, "fill/done")
	return err
}

// spec makes the disk of a slot, and returns what its shim is told.
func (p *Pools) spec(ctx context.Context, s Slot, from snapshot.Snapshot, kind template.Kind) (shim.Spec, error) {
	format := kind.DiskFormat()
	diskPath := filepath.Join(s.dir, slotDisk(format))
	err := p.Disks.Derive(ctx, backing.Disk{Path: diskPath, Base: p.Dir.Layer(from.Name, format), BaseFormat: format})
	if err != nil {
		return shim.Spec{}, err
	}
	step.Reached(ctx, "fill/disk")
	drive, err := p.Machines.Own(diskPath)
	if err != nil {
		return shim.Spec{}, err
	}
	runtimeDir := s.runtimeDir()
	if err := datadir.MakeRuntimeParent(runtimeDir); err != nil {
		return shim.Spec{}, err
	}
	return shim.Placeholder(shim.Spec{
		Backend: kind.Hardware.Backend,
		VMM: vmm.Config{
			ID:          "pool-" + filepath.Base(s.dir),
			Accelerator: kind.Hardware.Accelerator,
			VCPUs:       kind.Hardware.VCPUs,
			MemoryMiB:   kind.Hardware.MemoryMiB,
			Nested:      kind.Hardware.Nested,
			Drives:      []vmm.Drive{drive},
			Channel:     true,
			ConsolePath: filepath.Join(s.dir, slotConsole),
			LogPath:     filepath.Join(s.dir, machine.VMMLog),
			WorkDir:     s.dir,
			Restore:     &vmm.Restore{Memory: from.Path(snapshot.MemoryFile), State: from.Path(snapshot.StateFile)},
		},
		ReadyTimeout: p.Machines.BootTimeout(ctx, kind.Hardware.Accelerator),
		Standby:      true,
		RuntimeDir:   runtimeDir,
		Origin:       shim.Origin{DataDir: p.Dir.Root()},
	}, kind.Hardware.NIC.Mode(), p.Machines.MTU(kind.Hardware.Backend, kind.Hardware.NIC.Mode()))
}

// Reconcile removes the slots whose VM has died, and those of pools that are no more.
func (p *Pools) Reconcile(ctx context.Context) error {
	entries, err := os.ReadDir(p.Dir.Pools())
	if err != nil {
		return fmt.Errorf("reconcile pools: %w", err)
	}
	var errs []error
	for _, entry := range entries {
		lock, err := os.OpenFile(filepath.Join(p.Dir.Pool(entry.Name()), lockName), os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed since
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if flock.TryLock(lock) == nil {
			_, err := p.Store.Pools().Get(ctx, entry.Name())
			gone := errors.Is(err, smolvm.ErrPoolNotFound)
			errs = append(errs, p.empty(ctx, entry.Name(), !gone))
			if gone {
				errs = append(errs, p.removeDir(entry.Name()))
			}
		}
		_ = lock.Close()
	}
	return errors.Join(errs...)
}
