// Package start starts VMs: it tries the fastest way first, and falls back to the next.
//
// A start has a plan: the VM, and the ways to start it. Each way makes attempts; one that
// succeeds is committed, and ends the start. What keeps a start from a faster way is a
// warning in its report.
package start

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/template"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/warmpool"
)

// Starter starts the VMs of a data directory.
type Starter struct {
	Dir       *datadir.Dir
	Store     *store.Store
	Disks     *backing.Disks
	Machines  *machine.Builder
	Templates *template.Templates
	Pools     *warmpool.Pools
	Turns     *Turns
	Guests    Guests
	// Background makes what the next start of a kind needs.
	Background Background
	// OnlyBoot has no templates and pools used.
	OnlyBoot bool
	// RuntimeDir returns the directory for the sockets of a VM's shim.
	RuntimeDir func(id string) string
	// Program returns the program that serves as shim, with its arguments.
	Program func() ([]string, error)
	// Accelerator returns what a backend runs VMs on here. The error is a
	// [*smolvm.PrerequisiteError] if there is nothing.
	Accelerator func(ctx context.Context, backend string) (string, error)
	// HostBootID names the host's present boot; empty if that is not known.
	HostBootID func() string
	// ClientKey returns the key by which the data directory logs in to its VMs.
	ClientKey func() (ssh.Signer, error)
}

// Guests are the connections to guests that run.
type Guests interface {
	// Ready returns when a guest has run a program.
	Ready(ctx context.Context, vm store.VM) error
	// Forget drops the connection to a VM that has ended.
	Forget(id string)
}

// Background has work done by other processes.
type Background interface {
	// FillPool fills the pool of a kind.
	FillPool(key string) error
	// BuildTemplate makes the template of a kind, whose lock is handed over.
	BuildTemplate(kind template.Kind, config smolvm.VMConfig, lock *os.File) error
}

// Plan is what is to be started.
type Plan struct {
	VM      store.VM
	Options smolvm.StartOptions
	// From is the saved guest that the VM is to go on from; nil: none.
	From *Saved
	// Damage is why it can't; nil: it can.
	Damage error
}

// Saved describes a saved guest that a VM can be restored from.
type Saved struct {
	Method smolvm.StartMethod
	// Source names the snapshot or the VM.
	Source string
	Files  vmm.Restore
	// Base is the disk as it was then.
	Base string
	// InSession as in [shim.Spec].
	InSession bool
	// Must says that without its memory there is to be no VM.
	Must bool
	// Doubts is why its memory may not be what it was; a warning.
	Doubts error
}

// NotRestored returns the error of a start that must not do without the saved memory.
func NotRestored(why error) error {
	return fmt.Errorf("%w: %w; it can be booted from the disk alone, without what was in memory", smolvm.ErrNotRestored, why)
}

// Start starts the VM's shim, waits until the VM is ready, and writes that down. The VM's lock
// is held. Up to the commit at the end the shim undoes everything if this process dies. On
// failure nothing is left running, and the row says why.
func (s *Starter) Start(ctx context.Context, plan Plan) (store.VM, *smolvm.StartReport, error) {
	r := &run{Starter: s, plan: plan, vm: plan.VM, phaseBegan: time.Now()}
	defer r.close()
	if err := r.prepare(ctx); err != nil {
		return plan.VM, nil, wrap(plan.VM.ID, err)
	}
	endTurn, err := s.Turns.Take(ctx, s.Machines.Host.Slowness(ctx, r.report.Accelerator))
	if err != nil {
		return plan.VM, nil, wrap(plan.VM.ID, err)
	}
	defer endTurn()
	if time.Since(r.phaseBegan) > time.Millisecond {
		r.phase("wait for other starts")
	}
	if err := r.listen(ctx); err != nil {
		return plan.VM, nil, err
	}
	step.Reached(ctx, "start/listening")
	r.phase("ports")
	if err := r.climb(ctx, r.ways()); err != nil {
		return plan.VM, nil, s.failed(ctx, plan.VM, r.guestRan, errors.Join(err, r.dropDisk()))
	}
	r.prepareNext()
	vm, err := s.Store.GetVM(ctx, plan.VM.ID)
	return vm, &r.report, err
}

func wrap(id string, err error) error {
	return &smolvm.Error{Op: "start", Kind: "VM", ID: id, Err: err}
}

// failed writes down a start that did not succeed. A start that the caller gave up, or in
// which the guest did not run, leaves the VM in the state that it was in.
func (s *Starter) failed(ctx context.Context, vm store.VM, ran bool, cause error) error {
	err := wrap(vm.ID, cause)
	if ctx.Err() != nil && !errors.Is(cause, smolvm.ErrBootTimeout) {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if ran {
		return errors.Join(err, s.Store.MarkFailed(ctx, vm.ID, cause.Error(), time.Now().UTC()))
	}
	return errors.Join(err, s.Store.MarkNotStarted(ctx, vm.ID, vm.State, "its start failed: "+cause.Error()))
}
