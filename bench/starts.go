package main

import (
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/smolvm/smolvm"
)

const (
	// startRuns is how many starts of each method are measured.
	startRuns = 20
	// atOnce is how many clones are started together, in so many rounds.
	atOnce, rounds = 8, 20
	poolSize       = 2
	// idleTime is how long a VM has nothing to do before its memory is looked at.
	idleTime = 2 * time.Second
	// What is beside a start's own phases.
	others, firstExec = "create, record", "first exec"
)

// starting is what came of one start.
type starting struct {
	vm   smolvm.VMInfo
	took time.Duration // until the first exec was done
	exec time.Duration // that exec alone
}

// begin creates and starts a VM, and runs its first command.
func (b *bench) begin(opts smolvm.StartOptions, method smolvm.StartMethod) (starting, error) {
	began := time.Now()
	vm, err := b.m.Create(b.ctx, smolvm.VMConfig{Image: b.image}, smolvm.CreateOptions{})
	if err != nil {
		return starting{}, err
	}
	if vm, err = b.m.Start(b.ctx, vm.ID, opts); err != nil {
		return starting{}, err
	}
	started := time.Now()
	if err := b.exec(vm.ID); err != nil {
		return starting{}, err
	}
	took := time.Since(began)
	if vm.Start.Method != method {
		return starting{}, fmt.Errorf("VM %s was started by %s, not by %s: %q", vm.ID, vm.Start.Method, method, vm.Start.Warnings)
	}
	return starting{vm, took, time.Since(started)}, nil
}

// remove deletes a VM and says how long that took.
func (b *bench) remove(vm smolvm.VMInfo) (time.Duration, error) {
	began := time.Now()
	err := b.m.Delete(b.ctx, vm.ID, smolvm.DeleteOptions{})
	return time.Since(began), err
}

// starts measures clones against cold boots of the same VM, by turns.
func (b *bench) starts() error {
	if _, err := b.m.BuildTemplate(b.ctx, smolvm.TemplateOptions{}); err != nil {
		return err
	}
	var cold, clones, deletes []time.Duration
	var execs, rests []time.Duration
	var parts phases
	for range startRuns {
		booted, err := b.begin(smolvm.StartOptions{Cold: true}, smolvm.StartBoot)
		if err != nil {
			return err
		}
		cold = append(cold, booted.took)
		if _, err := b.remove(booted.vm); err != nil {
			return err
		}
		clone, err := b.begin(smolvm.StartOptions{}, smolvm.StartClone)
		if err != nil {
			return err
		}
		clones = append(clones, clone.took)
		parts.add("", clone.vm)
		rest := clone.took
		for _, phase := range clone.vm.Start.Timeline {
			rest -= phase.Duration
		}
		execs = append(execs, clone.exec)
		rests = append(rests, rest-clone.exec)
		took, err := b.remove(clone.vm)
		if err != nil {
			return err
		}
		deletes = append(deletes, took)
	}
	b.coldStart, b.clone = median(cold), median(clones)
	b.row("cold start → first exec done", both(cold), "")
	b.row("clone → first exec done", both(clones), "")
	b.row("ratio of the two, by medians", ratio(b.clone, b.coldStart), "0.10 ×")
	part := func(name string, times []time.Duration) { b.row("of a clone: "+name+", median", ms(median(times)), "") }
	for _, name := range parts.names {
		part(name, parts.times[name])
	}
	part(others, rests)
	part(firstExec, execs)
	b.row("`Delete` of a running clone", both(deletes), "100 ms")
	return b.cloneMemory()
}

// cloneMemory measures what an idle clone has for itself. Another one runs beside it: what
// only one process has mapped counts as private, also if it is a file that all clones map.
func (b *bench) cloneMemory() error {
	other, err := b.begin(smolvm.StartOptions{}, smolvm.StartClone)
	if err != nil {
		return err
	}
	clone, err := b.begin(smolvm.StartOptions{}, smolvm.StartClone)
	if err != nil {
		return err
	}
	if err := b.wait(idleTime); err != nil {
		return err
	}
	private, err := memoryOf(clone.vm.PID, "Private_Clean:", "Private_Dirty:")
	if err != nil {
		return err
	}
	b.row("private memory of an idle clone of 512 MiB", megabytes(private), "45 MB")
	_, err = b.remove(clone.vm)
	if _, failed := b.remove(other.vm); err == nil {
		err = failed
	}
	return err
}

func (b *bench) wait(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-b.ctx.Done():
		return b.ctx.Err()
	}
}

// pool measures starts that take a VM from a pool.
func (b *bench) pool() error {
	pool, err := b.m.SetPool(b.ctx, smolvm.PoolOptions{Size: poolSize})
	if err != nil {
		return err
	}
	var claims []time.Duration
	for range startRuns {
		claim, err := b.begin(smolvm.StartOptions{}, smolvm.StartPool)
		if err != nil {
			return err
		}
		claims = append(claims, claim.took)
		if _, err := b.remove(claim.vm); err != nil {
			return err
		}
		for ready := 0; ready < poolSize; {
			pools, err := b.m.Pools(b.ctx)
			if err != nil {
				return err
			}
			ready = pools[0].Ready
			if err := b.wait(100 * time.Millisecond); err != nil {
				return err
			}
		}
	}
	b.row("from a pool → first exec done", both(claims), "")
	b.row("ratio to a cold start, by medians", ratio(median(claims), b.coldStart), "0.05 ×")
	return b.m.RemovePool(b.ctx, pool.ID)
}

// forks measures how long a VM is held while it is forked.
func (b *bench) forks() error {
	parent, err := b.begin(smolvm.StartOptions{}, smolvm.StartClone)
	if err != nil {
		return err
	}
	var pauses, whole []time.Duration
	for range startRuns {
		began := time.Now()
		forked, err := b.m.Fork(b.ctx, parent.vm.ID, smolvm.ForkOptions{})
		if err != nil {
			return err
		}
		whole, pauses = append(whole, time.Since(began)), append(pauses, forked.Pause)
		if _, err := b.remove(forked.Children[0]); err != nil {
			return err
		}
	}
	b.row("`Fork` of a VM of 512 MiB: the parent is held", both(pauses), "150 ms")
	b.row("`Fork`: the child runs", both(whole), "")
	_, err = b.remove(parent.vm)
	return err
}

// together measures clones that are started at the same moment.
func (b *bench) together() error {
	var times []time.Duration
	for range rounds {
		clones := make([]starting, atOnce)
		began := time.Now()
		var group errgroup.Group
		for i := range clones {
			group.Go(func() (err error) {
				clones[i], err = b.begin(smolvm.StartOptions{}, smolvm.StartClone)
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		times = append(times, time.Since(began))
		for _, clone := range clones {
			if _, err := b.remove(clone.vm); err != nil {
				return err
			}
		}
	}
	fair := b.clone * atOnce / time.Duration(min(runtime.NumCPU(), atOnce))
	b.row(fmt.Sprintf("%d clones at once on %d CPUs, all first execs done", atOnce, runtime.NumCPU()), both(times), "")
	b.row("ratio to (8 / CPUs) × one clone", ratio(median(times), fair), "1.3 ×")
	return nil
}
