package start

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/warmpool"
)

const (
	// fastFraction of the time for a start is what a way may take that is not the last: it is
	// to be fast, and there must be time for the next.
	fastFraction = 2
	// earlyFraction of the time for a start is what a restore may have taken to be tried
	// again: one that fails early most likely found the host too busy.
	earlyFraction = 16
)

// A way is one of the ways to start a VM: from a pool, from a template, from a snapshot, or by
// booting it.
type way interface {
	// next returns the way's next attempt, after all earlier ones have failed. The error is
	// errNoMore if there is none, which is no failure; any other is why this way can't be
	// taken.
	next(ctx context.Context) (*attempt, error)
}

// errNoMore ends a way.
var errNoMore = errors.New("there is nothing more to try")

// ways returns the ways to start the VM, in the order in which they are tried.
func (r *run) ways() []way {
	from, cold := r.plan.From, r.plan.Options.Cold
	switch {
	case from != nil && from.Must && !cold:
		return []way{&restoring{run: r, from: *from, damage: r.plan.Damage}}
	case from != nil && !cold:
		return []way{&restoring{run: r, from: *from, damage: r.plan.Damage}, &booting{run: r}}
	case r.isCloneable():
		return []way{&claiming{run: r}, &cloning{run: r}, &booting{run: r}}
	}
	return []way{&booting{run: r}}
}

// isCloneable finds out the kind of template that the VM can be a clone of, and reports
// whether there is one. Only a VM that has never run can be.
func (r *run) isCloneable() bool {
	vm := r.vm
	if r.plan.From != nil || r.plan.Options.Cold || r.OnlyBoot || vm.State != smolvm.StateCreated || !vm.Config.UsesImage() ||
		vm.Layer != "" || !disk.IsUnwritten(vm.DiskPath) {
		return false
	}
	var err error
	r.kind, err = r.Templates.KindOf(vm.Config, vm.Image, vm.Backend, r.launch.Spec.VMM)
	return err == nil // else VMs of this kind have no template
}

// climb tries each way until an attempt succeeds. It returns the last failure if none does, or
// if nobody wants the VM any more.
func (r *run) climb(ctx context.Context, ways []way) error {
	var failure error
	for _, w := range ways {
		for {
			a, err := w.next(ctx)
			if errors.Is(err, errNoMore) {
				break
			}
			if err == nil {
				if err = r.try(ctx, a); err == nil {
					return nil
				}
				err = a.failure(err)
			}
			if ctx.Err() != nil {
				return err
			}
			failure = err
			r.warn(err)
			if a == nil {
				break // this way can't be taken
			}
			if a.must {
				failure = NotRestored(err)
			}
			r.phase("failed " + string(a.method))
		}
	}
	return failure
}

// claiming starts a VM by one of its kind that stands by in a pool.
type claiming struct {
	*run
	listed bool
	slots  []warmpool.Slot
}

func (c *claiming) next(ctx context.Context) (*attempt, error) {
	key := c.kind.Key()
	if !c.listed {
		c.slots, c.listed = c.Pools.Slots(key), true
	}
	for len(c.slots) > 0 {
		slot := c.slots[0]
		c.slots = c.slots[1:]
		taken, err := slot.Take(ctx)
		if errors.Is(err, warmpool.ErrTaken) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s of %s: %w", smolvm.StartPool, key, err)
		}
		return c.claim(key, taken), nil
	}
	return nil, errNoMore
}

// claim makes a slot's shim that of the VM, and has the shim make its files the VM's.
func (c *claiming) claim(key string, taken *warmpool.Taken) *attempt {
	c.diskTouched = true
	c.phase("disk")
	launch := c.launch
	launch.Spec.ReadyTimeout /= fastFraction
	launch.Spec.WarmUp = ""
	slot := taken.Slot(warmpool.Files{
		Disk: c.vm.DiskPath, Console: launch.Spec.VMM.ConsolePath, VMMLog: launch.Spec.VMM.LogPath, ShimLog: launch.LogPath,
	})
	return &attempt{
		method: smolvm.StartPool, source: key, launch: launch,
		begin: func(ctx context.Context, opts shim.LaunchOptions) (*shim.Launched, error) {
			return shim.Claim(ctx, slot, opts)
		},
		commit: func(ctx context.Context, launched *shim.Launched) error {
			// No layer is collected while the disk moves, in the middle of a look for its users.
			unlock, err := c.Disks.Lock(ctx)
			if err != nil {
				return err
			}
			defer unlock()
			if err := c.Disks.Adopt(ctx, taken.DiskPath(disk.FormatOf(c.vm.DiskPath)), c.vm.DiskPath); err != nil {
				return err
			}
			return launched.Commit()
		},
		end: func(ctx context.Context, failure error) (err error) {
			if failure != nil {
				err = taken.Discard(ctx)
			}
			return errors.Join(err, taken.Close())
		},
	}
}

// cloning starts a VM from the template of its kind.
type cloning struct {
	*run
	restoring *restoring
}

func (c *cloning) next(ctx context.Context) (*attempt, error) {
	if c.restoring == nil {
		found, err := c.await(ctx)
		if err != nil {
			return nil, err
		}
		c.restoring = &restoring{run: c.run, from: Saved{
			Method: smolvm.StartClone,
			Source: found.Name,
			Files:  vmm.Restore{Memory: found.Path(snapshot.MemoryFile), State: found.Path(snapshot.StateFile)},
			Base:   c.Dir.Layer(found.Name, c.kind.DiskFormat()),
		}, used: func() { c.Templates.Saved.Used(found) }}
	}
	a, err := c.restoring.next(ctx)
	if errors.Is(err, errNoMore) {
		// What could not be cloned twice will not be the next time.
		c.Templates.Drop(ctx, c.restoring.from.Source)
	}
	return a, err
}

// await returns the template of the VM's kind, and takes the lock under which it is to be made
// if there is none.
func (c *cloning) await(ctx context.Context) (snapshot.Snapshot, error) {
	bounded, cancel := context.WithTimeout(ctx, c.launch.Spec.ReadyTimeout/fastFraction)
	defer cancel()
	found, lock, warnings, err := c.Templates.Await(bounded, c.kind)
	c.kindLock = lock
	c.report.Warnings = append(c.report.Warnings, warnings...)
	c.phase("template")
	switch {
	case err == nil:
		return found, nil
	case ctx.Err() != nil:
		return found, context.Cause(ctx)
	case errors.Is(err, smolvm.ErrTemplateNotFound):
		if why := c.Templates.WhyNone(c.kind); why != nil {
			c.warn(why)
		}
		return found, errNoMore
	}
	return found, fmt.Errorf("template: %w", err)
}

// restoring starts a VM from a saved guest. One that fails early is restored once more.
type restoring struct {
	*run
	from   Saved
	damage error // why it can't be restored; nil: it can
	used   func()

	began time.Time // the first attempt
	again bool      // it was the second one that failed
}

func (w *restoring) next(ctx context.Context) (*attempt, error) {
	switch {
	case w.damage != nil && w.from.Must:
		return nil, NotRestored(w.damage)
	case w.damage != nil:
		return nil, w.damage
	case w.began.IsZero():
		if w.from.Doubts != nil {
			w.warn(w.from.Doubts)
		}
		w.began = time.Now()
	case w.again, time.Since(w.began) > w.launch.Spec.ReadyTimeout/earlyFraction:
		return nil, errNoMore
	default:
		w.again = true
	}
	a := &attempt{method: w.from.Method, source: w.from.Source, must: w.from.Must, begin: shim.Launch, succeeded: w.used}
	var err error
	if a.launch, err = w.launchOrders(ctx); err != nil {
		err = a.failure(err)
		if a.must {
			err = NotRestored(err)
		}
		return nil, err
	}
	return a, nil
}

// launchOrders makes the disk what it was when the guest was saved, and returns what the shim is
// told.
func (w *restoring) launchOrders(ctx context.Context) (shim.LaunchOptions, error) {
	launch := w.launch
	// The disk of a VM that is just being restored is what it is to be.
	made := !w.diskTouched && w.vm.State == smolvm.StateCreated && w.vm.Layer == w.from.Base && disk.IsUnwritten(w.vm.DiskPath)
	w.diskTouched = true
	if !made {
		if err := w.Machines.Rebase(ctx, w.vm, w.from.Base, disk.FormatOf(w.from.Base)); err != nil {
			return launch, err
		}
	}
	w.phase("disk")
	var err error
	if launch.Spec.VMM.Drives, err = w.Machines.Drives(w.vm); err != nil { // its base is another one now
		return launch, err
	}
	launch.Spec.VMM.Restore = &w.from.Files
	launch.Spec.InSession = w.from.InSession
	if !w.from.Must { // else there is no other way that needs time
		launch.Spec.ReadyTimeout /= fastFraction
	}
	launch.Spec.WarmUp = ""
	return launch, nil
}

// booting boots a VM, from a disk as it was before other ways were tried.
type booting struct {
	*run
	tried bool
}

func (b *booting) next(ctx context.Context) (*attempt, error) {
	if b.tried {
		return nil, errNoMore
	}
	b.tried = true
	launch := b.launch
	if b.diskTouched {
		base, format, err := b.base(ctx)
		if err == nil {
			err = b.Machines.Rebase(ctx, b.vm, base, format)
		}
		if err == nil {
			launch.Spec.VMM.Drives, err = b.Machines.Drives(b.vm)
		}
		if err != nil {
			return nil, err
		}
	}
	return &attempt{method: smolvm.StartBoot, launch: launch, begin: shim.Launch}, nil
}

// base returns the file that the disk is based on when it is booted from.
func (b *booting) base(ctx context.Context) (path, format string, err error) {
	if b.plan.From != nil {
		return b.plan.From.Base, disk.FormatOf(b.plan.From.Base), nil
	}
	return b.Machines.BaseOf(ctx, b.vm)
}
