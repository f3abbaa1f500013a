package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

// fastFraction of the time for a start is what a method may take that is not the last: it
// is to be fast, and there must be time for the next.
const fastFraction = 2

// earlyFraction of the time for a start is what a method may have taken to be tried again.
const earlyFraction = 16

// savedGuest describes a saved guest that a VM can be restored from.
type savedGuest struct {
	method smolvm.StartMethod
	source string
	files  vmm.Restore
	// base is the disk as it was then.
	base string
	// inSession as in [shim.Spec].
	inSession bool
	// must says that without its memory there is to be no VM.
	must bool
	// doubts is why its memory may not be what it was; a warning.
	doubts error
}

// starting is one start of a VM. It tries the fastest method first; whatever keeps it from
// that is a warning, and the next one is tried.
type starting struct {
	m         *Manager
	vm        store.VM
	opts      smolvm.StartOptions
	launch    shim.LaunchOptions
	listeners []boundForward

	phaseBegan time.Time
	report     smolvm.StartReport
	started    bool
	ran        bool // the guest, in the last attempt
	// confirm commits a start; nil: it is just committed.
	confirm func(context.Context, *shim.Launched) error
	// touched says that the disk is not, or may not be, what a boot is to begin with.
	touched bool
	// lock is that of the template that is to be made of this start's kind.
	lock   *os.File
	recipe recipe
}

// boot starts the VM's shim, waits until the VM is ready, and writes that down. Up to
// the commit at its end the shim undoes everything if this process dies. From, if not
// nil, is what the VM is to go on from, unless damage says why it can't: then it boots from
// the disk.
func (m *Manager) boot(ctx context.Context, vm store.VM, opts smolvm.StartOptions, from *savedGuest, damage error) (_ store.VM, _ *smolvm.StartReport, err error) {
	s := &starting{m: m, vm: vm, opts: opts, phaseBegan: time.Now()}
	defer s.close()
	s.touched = from != nil && vm.State != smolvm.StateCreated // its own disk is not that of the snapshot
	if vm.State == smolvm.StateError && from == nil {
		s.warn(fmt.Errorf("it had failed (%s); it was booted from its disk, which is as after a power cut", vm.Cause))
	}
	if from == nil {
		_ = os.Remove(m.keptDisk(vm.ID)) // of a process that was killed
	}
	if vm.State == smolvm.StateCreated && vm.Layer != "" && from == nil {
		s.warn(errors.New("it was to go on from a snapshot, or as a fork, and that was cut short; it was booted from the disk of that"))
	}
	if err := m.machines.EnsureDisk(ctx, vm); err != nil {
		return vm, nil, vmError("start", vm.ID, err)
	}
	step.Reached(ctx, "start/disk")
	if s.launch, err = m.prepare(ctx, vm, opts); err != nil {
		return vm, nil, err
	}
	s.report.Backend, s.report.Accelerator = vm.Backend, s.launch.Spec.VMM.Accelerator
	s.phase("prepare")
	endTurn, err := m.startTurn(ctx, s.report.Accelerator)
	if err != nil {
		return vm, nil, vmError("start", vm.ID, err)
	}
	defer endTurn()
	if time.Since(s.phaseBegan) > time.Millisecond {
		s.phase("wait for other starts")
	}
	if s.listeners, err = m.listen(ctx, &s.vm); err != nil {
		return vm, nil, err
	}
	for _, listener := range s.listeners {
		s.launch.Listeners = append(s.launch.Listeners, listener.listener)
		s.launch.Spec.Forwards = append(s.launch.Spec.Forwards, listener.forward)
	}
	step.Reached(ctx, "start/listening")
	s.phase("ports")
	switch {
	case from == nil:
		err = s.fast(ctx)
	case opts.Cold:
	case damage != nil && from.must:
		err = notRestored(damage)
	case damage != nil:
		s.warn(damage)
	default:
		err = s.restore(ctx, *from)
	}
	if err == nil && !s.started {
		err = s.cold(ctx, from)
	}
	if err != nil {
		return vm, nil, m.failed(ctx, vm, s.ran, err)
	}
	s.prepareNext()
	vm, err = m.store.GetVM(ctx, vm.ID)
	return vm, &s.report, err
}

// close lets go of what the start has held.
func (s *starting) close() {
	closeAll(s.listeners)
	if s.lock != nil {
		_ = s.lock.Close()
	}
}

// phase ends a phase of the start.
func (s *starting) phase(name string) {
	now := time.Now()
	s.report.Timeline = append(s.report.Timeline, smolvm.Phase{Name: name, Duration: now.Sub(s.phaseBegan)})
	s.phaseBegan = now
}

func (s *starting) warn(err error) { s.report.Warnings = append(s.report.Warnings, err.Error()) }

// fast tries the methods that are faster than a boot. Methods that can't be had are not
// errors; an error ends the start.
func (s *starting) fast(ctx context.Context) error {
	config := s.vm.Config
	if s.opts.Cold || !s.m.config.usesTemplates() || s.vm.State != smolvm.StateCreated || !config.UsesImage() ||
		s.vm.Layer != "" || !disk.Pristine(s.vm.DiskPath) {
		return nil
	}
	r, err := s.m.recipeOf(config, s.vm.Image, s.vm.Backend, s.launch.Spec.VMM)
	if err != nil {
		return nil //nolint:nilerr // VMs of this kind have no template
	}
	s.recipe = r
	if err := s.claim(ctx); err != nil || s.started {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, s.launch.Spec.ReadyTimeout/fastFraction)
	found, lock, warnings, err := s.m.awaitTemplate(bounded, r)
	cancel()
	s.lock = lock
	s.report.Warnings = append(s.report.Warnings, warnings...)
	s.phase("template")
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, smolvm.ErrTemplateNotFound):
		if why := s.m.whyNoTemplate(r); why != nil {
			s.warn(why)
		}
		return nil
	case err != nil:
		s.warn(fmt.Errorf("template: %w", err))
		return nil
	}
	err = s.restore(ctx, savedGuest{
		method: smolvm.StartClone,
		source: found.Name,
		files:  vmm.Restore{Memory: found.Path(snapshot.MemoryFile), State: found.Path(snapshot.StateFile)},
		base:   s.m.dir.Layer(found.Name),
	})
	if err == nil && s.started {
		s.m.templates.Used(found)
	} else if err == nil {
		// What could not be cloned once will not be the next time.
		s.m.dropTemplate(ctx, found.Name)
	}
	return err
}

// restore starts the VM from a saved guest. One that fails early is restored once more: the
// host may have been too busy. What is returned is an error that ends the start.
func (s *starting) restore(ctx context.Context, from savedGuest) error {
	if from.doubts != nil {
		s.warn(from.doubts)
	}
	began := time.Now()
	err := s.restoreOnce(ctx, from)
	if err != nil && ctx.Err() == nil && time.Since(began) <= s.launch.Spec.ReadyTimeout/earlyFraction {
		if err := s.missed(ctx, from.method, from.source, err); err != nil {
			return err
		}
		err = s.restoreOnce(ctx, from)
	}
	if err != nil && ctx.Err() == nil && from.must {
		return notRestored(fmt.Errorf("%s of %s: %w", from.method, from.source, err))
	}
	return s.missed(ctx, from.method, from.source, err)
}

// notRestored is the error of a start that must not do without the saved memory.
func notRestored(why error) error {
	return fmt.Errorf("%w: %w; it can be booted from the disk alone, without what was in memory", smolvm.ErrNotRestored, why)
}

func (s *starting) restoreOnce(ctx context.Context, from savedGuest) error {
	// The disk of a VM that is just being restored is what it is to be.
	made := !s.touched && s.vm.State == smolvm.StateCreated && s.vm.Layer == from.base && disk.Pristine(s.vm.DiskPath)
	s.touched = true
	if !made {
		if err := s.m.machines.Rebase(ctx, s.vm, from.base, disk.QCOW2); err != nil {
			return err
		}
	}
	s.phase("disk")
	launch := s.launch
	drives, err := s.m.machines.Drives(s.vm) // its base is another one now
	if err != nil {
		return err
	}
	launch.Spec.VMM.Drives = drives
	launch.Spec.VMM.Restore = &from.files
	launch.Spec.InSession = from.inSession
	if !from.must { // else there is no other method that needs time
		launch.Spec.ReadyTimeout /= fastFraction
	}
	launch.Spec.WarmUp = ""
	return s.attempt(ctx, launch, from.method, from.source, shim.Launch)
}

// missed makes a warning of a method that could not be had, unless nobody wants the VM any
// more.
func (s *starting) missed(ctx context.Context, method smolvm.StartMethod, source string, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return err
	}
	s.warn(fmt.Errorf("%s of %s: %w", method, source, err))
	s.phase("failed " + string(method))
	return nil
}

// cold boots the VM, from a disk as it was before other methods were tried.
func (s *starting) cold(ctx context.Context, from *savedGuest) error {
	if s.touched {
		base, format, err := s.m.machines.BaseOf(ctx, s.vm)
		if from != nil {
			base, format, err = from.base, disk.QCOW2, nil
		}
		if err != nil {
			return err
		}
		if err := s.m.machines.Rebase(ctx, s.vm, base, format); err != nil {
			return err
		}
		if s.launch.Spec.VMM.Drives, err = s.m.machines.Drives(s.vm); err != nil {
			return err
		}
	}
	return s.attempt(ctx, s.launch, smolvm.StartBoot, "", shim.Launch)
}

// attempt tries one method, up to the commit.
func (s *starting) attempt(ctx context.Context, opts shim.LaunchOptions, method smolvm.StartMethod, source string, launch func(context.Context, shim.LaunchOptions) (*shim.Launched, error)) error {
	// What a shim has left that was killed before it was confirmed, in an earlier start or in
	// an earlier attempt of this one.
	if err := shim.RemoveRuntimeDir(opts.Spec.RuntimeDir); err != nil {
		return err
	}
	opts.Spec.Run = newRun()
	if opts.Spec.Hello != nil {
		hello := *opts.Spec.Hello
		hello.BootID = identity.NewBootID()
		opts.Spec.Hello = &hello
	}
	written := s.persistDisk(method)
	launched, err := launch(ctx, opts)
	if s.ran = err == nil || shim.GuestRan(err); err != nil {
		return err
	}
	step.Reached(ctx, "start/ready")
	phases := s.launchPhases(launched, method)
	report := s.report
	report.Method, report.Source, report.Limits = method, source, launched.Limits
	report.Timeline = append(report.Timeline[:len(report.Timeline):len(report.Timeline)], phases...)
	report.Warnings = append(report.Warnings[:len(report.Warnings):len(report.Warnings)], launched.Warnings...)
	said := launched.Answer.Identity
	if opts.Spec.Hello != nil {
		report.Verified, err = identity.Verify(*opts.Spec.Hello, said, method != smolvm.StartBoot)
	}
	if err == nil && method != smolvm.StartBoot && opts.Spec.Hello != nil {
		began := time.Now()
		err = s.useGuest(ctx, opts)
		report.Timeline = append(report.Timeline, smolvm.Phase{Name: "first use", Duration: time.Since(began)})
	}
	if err == nil {
		err = <-written
	}
	if err == nil {
		err = s.m.store.MarkStarted(context.WithoutCancel(ctx), s.vm.ID, store.Started{
			Run:         opts.Spec.Run,
			PID:         launched.VMMPID,
			PIDStart:    launched.VMMStart,
			ShimPID:     launched.PID,
			ShimStart:   launched.Start,
			BootID:      s.m.bootID(),
			Accelerator: opts.Spec.VMM.Accelerator,
			At:          time.Now().UTC(),
			Report:      report,
			Identity: store.Identity{
				BootID: said.BootID, Random: said.Random, MachineID: said.MachineID,
				HostKey: said.HostKey, MAC: said.MAC,
			},
		})
	}
	if err == nil {
		step.Reached(ctx, "start/written")
		if s.confirm != nil {
			err = s.confirm(context.WithoutCancel(ctx), launched)
		} else {
			err = launched.Commit()
		}
	}
	if err != nil {
		ctx := context.WithoutCancel(ctx)
		launched.Abort(ctx)
		// If the shim has not come to it, so that the next method can be tried.
		s.m.forgetClient(s.vm.ID)
		_, endErr := s.m.store.MarkEnded(ctx, s.vm.ID, opts.Spec.Run, s.vm.State, err.Error(), time.Now().UTC())
		return errors.Join(err, endErr)
	}
	step.Reached(ctx, "start/confirmed")
	s.report, s.started = report, true
	s.phaseBegan = time.Now()
	return nil
}

// useGuest returns when a guest that was restored has run a program: none is handed out that
// can't.
func (s *starting) useGuest(ctx context.Context, opts shim.LaunchOptions) error {
	ctx, cancel := context.WithTimeoutCause(ctx, opts.Spec.ReadyTimeout, smolvm.ErrBootTimeout)
	defer cancel()
	vm := s.vm
	vm.Run = opts.Spec.Run
	client, err := s.m.clientOf(vm)
	if err != nil {
		return err
	}
	return client.Ready(ctx)
}

// persistDisk has a new disk on stable storage, while the guest starts: a VM that is written
// down as started must have it after a power cut. That of a VM from a pool is older.
func (s *starting) persistDisk(method smolvm.StartMethod) <-chan error {
	done := make(chan error, 1)
	if s.vm.DiskPath == "" || s.vm.State != smolvm.StateCreated || method == smolvm.StartPool {
		done <- nil
		return done
	}
	go func() { done <- s.m.disks.Persist(s.vm.DiskPath) }()
	return done
}

// prepareNext starts a background task that builds the template or fills the pool, for the
// next start of this kind.
func (s *starting) prepareNext() {
	var err error
	switch {
	case s.report.Method == smolvm.StartPool:
		err = s.m.startTaskAside(task{Pool: s.recipe.key()}, nil)
	case s.lock != nil:
		config := s.vm.Config
		err = s.m.startTaskAside(task{Template: &templateTask{Recipe: s.recipe, Config: smolvm.VMConfig{
			Image: config.Image, VCPUs: config.VCPUs, MemoryMiB: config.MemoryMiB, DiskSizeMiB: config.DiskSizeMiB, WarmUp: config.WarmUp,
		}}}, s.lock)
	}
	if err != nil {
		s.warn(fmt.Errorf("prepare the next start: %w", err))
	}
}

// launchPhases says what the launching of the VM took its time for.
func (s *starting) launchPhases(launched *shim.Launched, method smolvm.StartMethod) []smolvm.Phase {
	took := time.Since(s.phaseBegan)
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

// guestPhases says how long the kernel took to start the agent, and the agent to become
// what it was told.
func guestPhases(steps []wire.Step) (kernel, identity time.Duration) {
	at := map[string]time.Duration{}
	for _, step := range steps {
		at[step.Name] = step.At
	}
	return at["agent started"], at["ready"] - at["hello received"]
}
