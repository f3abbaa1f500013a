package start

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
)

// attempt is one attempt to start a VM.
type attempt struct {
	method smolvm.StartMethod
	// source is what the VM goes on from; empty: nothing.
	source string
	// must says that there is to be no VM if this fails.
	must   bool
	launch shim.LaunchOptions
	// begin returns a shim whose VM is ready.
	begin func(context.Context, shim.LaunchOptions) (*shim.Launched, error)
	// commit confirms the start, which is written down by then; nil: by the shim's own.
	commit func(context.Context, *shim.Launched) error
	// succeeded is called when the start is confirmed; nil: nothing.
	succeeded func()
	// end is called at the end, with the attempt's error; nil: nothing.
	end func(context.Context, error) error
}

// failure returns an error of the attempt with what was attempted.
func (a *attempt) failure(err error) error {
	if a.source == "" {
		return err
	}
	return fmt.Errorf("%s of %s: %w", a.method, a.source, err)
}

// try makes an attempt, up to the commit. If it fails nothing runs.
func (r *run) try(ctx context.Context, a *attempt) error {
	err := r.start(ctx, a)
	if a.end != nil {
		err = errors.Join(err, a.end(context.WithoutCancel(ctx), err))
	}
	if err == nil && a.succeeded != nil {
		a.succeeded()
	}
	return err
}

func (r *run) start(ctx context.Context, a *attempt) error {
	opts := a.launch
	// What a shim has left that was killed before it was confirmed, in an earlier start or in
	// an earlier attempt of this one.
	if err := shim.RemoveRuntimeDir(opts.Spec.RuntimeDir); err != nil {
		return err
	}
	opts.Spec.Run = shim.NewRun()
	if opts.Spec.Hello != nil {
		hello := *opts.Spec.Hello
		hello.BootID = identity.NewBootID()
		opts.Spec.Hello = &hello
	}
	written := r.persistDisk(a.method)
	launched, err := a.begin(ctx, opts)
	if r.guestRan = err == nil || shim.GuestRan(err); err != nil {
		return err
	}
	step.Reached(ctx, "start/ready")
	report, err := r.check(ctx, a, opts.Spec, launched)
	if err == nil {
		err = <-written
	}
	if err == nil {
		err = r.confirm(context.WithoutCancel(ctx), a, opts.Spec, launched, report)
	}
	if err != nil {
		ctx := context.WithoutCancel(ctx)
		launched.Abort(ctx)
		// If the shim has not come to it, so that the next way can be tried.
		r.Guests.Forget(r.vm.ID)
		_, endErr := r.Store.MarkEnded(ctx, r.vm.ID, opts.Spec.Run, r.vm.State, err.Error(), time.Now().UTC())
		return errors.Join(err, endErr)
	}
	step.Reached(ctx, "start/confirmed")
	r.report = report
	r.phaseBegan = time.Now()
	return nil
}

// check finds out whether a guest has become what it was told, and can be used, and returns
// the report of its start.
func (r *run) check(ctx context.Context, a *attempt, spec shim.Spec, launched *shim.Launched) (smolvm.StartReport, error) {
	phases := launchPhases(launched, a.method, time.Since(r.phaseBegan))
	report := r.report
	report.Method, report.Source, report.Limits = a.method, a.source, launched.Limits
	report.Timeline = append(slices.Clip(report.Timeline), phases...)
	report.Warnings = append(slices.Clip(report.Warnings), launched.Warnings...)
	if spec.Hello == nil {
		return report, nil
	}
	var err error
	restored := a.method != smolvm.StartBoot
	report.Verified, err = identity.Verify(*spec.Hello, launched.Answer.Identity, restored)
	if err == nil && restored {
		began := time.Now()
		err = r.useGuest(ctx, spec)
		report.Timeline = append(report.Timeline, smolvm.Phase{Name: "first use", Duration: time.Since(began)})
	}
	return report, err
}

// useGuest returns when a guest that was restored has run a program: none is handed out that
// can't.
func (r *run) useGuest(ctx context.Context, spec shim.Spec) error {
	ctx, cancel := context.WithTimeoutCause(ctx, spec.ReadyTimeout, smolvm.ErrBootTimeout)
	defer cancel()
	vm := r.vm
	vm.Run = spec.Run
	return r.Guests.Ready(ctx, vm)
}

// confirm writes a start down, and commits it.
func (r *run) confirm(ctx context.Context, a *attempt, spec shim.Spec, launched *shim.Launched, report smolvm.StartReport) error {
	said := launched.Answer.Identity
	err := r.Store.MarkStarted(ctx, r.vm.ID, store.Started{
		Run:         spec.Run,
		PID:         launched.VMMPID,
		PIDStart:    launched.VMMStart,
		ShimPID:     launched.PID,
		ShimStart:   launched.Start,
		BootID:      r.HostBootID(),
		Accelerator: spec.VMM.Accelerator,
		At:          time.Now().UTC(),
		Report:      report,
		Identity: store.Identity{
			BootID: said.BootID, Random: said.Random, MachineID: said.MachineID,
			HostKey: said.HostKey, MAC: said.MAC,
		},
	})
	if err != nil {
		return err
	}
	step.Reached(ctx, "start/written")
	if a.commit != nil {
		return a.commit(ctx, launched)
	}
	return launched.Commit()
}

// persistDisk has a new disk on stable storage, while the guest starts: a VM that is written
// down as started must have it after a power cut. That of a VM from a pool is older.
func (r *run) persistDisk(method smolvm.StartMethod) <-chan error {
	done := make(chan error, 1)
	if r.vm.DiskPath == "" || r.vm.State != smolvm.StateCreated || method == smolvm.StartPool {
		done <- nil
		return done
	}
	go func() { done <- r.Disks.Persist(r.vm.DiskPath) }()
	return done
}

// launchPhases returns what the launching of the VM took its time for.
func launchPhases(launched *shim.Launched, method smolvm.StartMethod, took time.Duration) []smolvm.Phase {
	var phases []smolvm.Phase
	add := func(name string, duration time.Duration) {
		phases = append(phases, smolvm.Phase{Name: name, Duration: max(duration, 0)})
	}
	var last time.Duration
	if n := len(launched.Timeline); n > 0 {
		add("shim", took-launched.Timeline[n-1].At)
	}
	for _, step := range launched.Timeline {
		duration := step.At - last
		last = step.At
		if step.Name != "agent" {
			add(step.Name, duration)
			continue
		}
		// What happened in the guest meanwhile it tells by its own clock.
		kernel, identity := guestPhases(launched.Answer.Timeline)
		if method != smolvm.StartBoot {
			kernel = 0
		} else {
			add("kernel", kernel)
		}
		add("agent", duration-kernel-identity)
		add("identity", identity)
	}
	return phases
}

// guestPhases returns how long the kernel took to start the agent, and the agent to become
// what it was told.
func guestPhases(steps []wire.Step) (kernel, identity time.Duration) {
	at := map[string]time.Duration{}
	for _, step := range steps {
		at[step.Name] = step.At
	}
	return at["agent started"], at["ready"] - at["hello received"]
}
