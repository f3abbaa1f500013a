// Package process is the process beside a running VM. It is the VMM's parent, so it
// knows of the VM's end and its cause; it holds the guest channel and the VM's
// rootless network; and it ends when the VM ends. Package shim is how other processes
// start it and ask it.
package process

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/compat"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Options of [Main].
type Options struct {
	// Stdin carries the launcher's orders.
	Stdin io.Reader
	// Backends are what VMs can be run by.
	Backends []vmm.Backend
	// Exited is called when the VM has ended, to write that down.
	Exited func(context.Context, shim.ExitRecord) error
	// Halted is called when the VMM has paused the guest by itself, to write that down.
	// Nil: nobody wants to know.
	Halted func(context.Context, shim.HaltRecord) error
}

// process is the running shim.
type process struct {
	spec    shim.Spec
	opts    Options
	log     *slog.Logger
	began   time.Time
	reports *os.File
	claimed []io.Closer // of the forwards, if the shim stood by
	slot    *slotFiles  // nil when the start has been confirmed

	network  network.Attachment // nil: the VM has none
	instance vmm.Instance
	ran      bool        // the guest's CPUs have run
	channel  vmm.Channel // nil while it has not been opened
	link     *agent.Link // nil without an agent
	answer   *wire.Answer
	timeline []wire.Step
	warnings []string

	committed    chan struct{} // closed at the launcher's commit
	launcherGone chan struct{} // closed when the launcher's end of the pipe closes
	idle         *time.Timer   // see active
	paused       atomic.Bool
	halts        *halts
	saving       sync.Mutex // held by save

	mu       sync.Mutex // guards the following
	forwards map[shim.Forward]io.Closer
	notes    []string       // why and how the VM was stopped
	ended    bool           // no more requests are taken
	requests sync.WaitGroup // counts those being answered
}

// Main runs one VM from its start to its end. ctx being done stops the VM in an
// orderly way.
func Main(ctx context.Context, opts Options) error {
	limitMemory()
	raiseOpenFiles()
	s := &process{
		opts:         opts,
		log:          slog.New(slog.NewTextHandler(ring.Over(os.Stderr, ring.LogBytes), nil)),
		began:        time.Now(),
		reports:      os.NewFile(shim.ReportsFD, "reports"),
		committed:    make(chan struct{}),
		launcherGone: make(chan struct{}),
		idle:         time.AfterFunc(time.Hour, releaseMemory),
		forwards:     map[shim.Forward]io.Closer{},
		halts:        newHalts(),
	}
	orders := bufio.NewReader(opts.Stdin)
	line, err := orders.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &s.spec)
	}
	if err != nil {
		return fmt.Errorf("read orders (a shim is started by smolvm, not by hand): %w", err)
	}
	if err := compat.Check("the shim's order", s.spec.Protocol, shim.OrderProtocol); err != nil {
		return err
	}
	if err := keepInherited(len(s.spec.Forwards)); err != nil {
		return err
	}
	go s.follow(orders, s.committed, s.launcherGone)
	if s.spec.Freeze != nil {
		return s.freeze(ctx, *s.spec.Freeze)
	}
	if s.spec.Standby {
		if claimed, err := s.standBy(ctx); err != nil || !claimed {
			return err
		}
	}
	err = s.run(ctx)
	if err != nil {
		s.log.Error("shim failed", "vm", s.spec.ID, "error", err)
	}
	return err
}

// active notes that something happened; memory is given back when nothing has for a
// while.
func (s *process) active() { s.idle.Reset(quiet) }

// follow reads the launcher's orders to their end.
func (s *process) follow(orders *bufio.Reader, committed, gone chan struct{}) {
	defer close(gone)
	line, err := orders.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != shim.CommitOrder {
		return
	}
	close(committed)
	_, _ = io.Copy(io.Discard, orders)
}

func (s *process) run(ctx context.Context) error {
	closeAll, err := s.start(ctx)
	defer closeAll()
	if err != nil {
		closeAll()
		failed := shim.NewFailure(err)
		failed.Ran = s.ran
		s.report(shim.Report{Failure: failed})
		return errors.Join(err, s.recordOrphan())
	}
	s.report(shim.Report{
		PID:      os.Getpid(),
		Start:    startOf(os.Getpid()),
		VMMPID:   s.instance.PID(),
		VMMStart: startOf(s.instance.PID()),
		Answer:   s.answer,
		Timeline: s.timeline,
		Warnings: s.warnings,
		Limits:   s.limits(),
	})
	s.attend(ctx)
	closeAll()
	err = s.record()
	s.endRequests() // or a client that has asked for the end would not learn of it
	return err
}

func startOf(pid int) uint64 {
	start, err := proc.StartTime(pid)
	if err != nil {
		return 0 // it has ended; nobody will take another process for it
	}
	return start
}

// report tells the launcher; if it is gone, that is noticed elsewhere.
func (s *process) report(r shim.Report) {
	line, err := json.Marshal(r)
	if err == nil {
		_, err = s.reports.Write(append(line, '\n'))
	}
	if err != nil {
		s.log.Warn("report to launcher", "error", err)
	}
}

func (s *process) step(name string) {
	s.timeline = append(s.timeline, wire.Step{Name: name, At: time.Since(s.began)})
}

// cleanupStack holds the functions that undo a start. They are called once, in the reverse
// order.
type cleanupStack struct {
	once sync.Once
	all  []func()
}

func (u *cleanupStack) add(f func()) { u.all = append(u.all, f) }

func (u *cleanupStack) run() {
	u.once.Do(func() {
		for _, f := range slices.Backward(u.all) {
			f()
		}
	})
}

// start brings the VM up to readiness. What it returns undoes all of it, once, and
// is to be called in any case.
func (s *process) start(ctx context.Context) (undo func(), err error) {
	var u cleanupStack
	control, agents, err := s.listen()
	if err != nil {
		return u.run, err
	}
	u.add(func() {
		_, _ = control.Close(), agents.Close()
		_ = os.RemoveAll(s.spec.RuntimeDir)
	})
	if err := s.startNetwork(&u); err != nil {
		return u.run, err
	}
	listeners := s.claimed
	if listeners == nil {
		if listeners, err = inheritListeners(s.spec.Forwards); err != nil {
			return u.run, err
		}
	}
	if s.network == nil && len(listeners) > 0 {
		return u.run, errors.New("a VM without a network can't have port forwards")
	}
	for i, forward := range s.spec.Forwards {
		s.forwards[forward] = s.forward(listeners[i], forward.GuestPort)
	}
	u.add(s.kill)
	if err := s.bringUp(ctx); err != nil {
		return u.run, err
	}
	s.step("ready")
	go s.serveControl(control)
	go s.serveAgents(agents)
	return u.run, nil
}

// startNetwork makes the VM's network, unless the shim has one from standing by.
func (s *process) startNetwork(u *cleanupStack) (err error) {
	if s.spec.Network == nil {
		return nil
	}
	if s.network != nil {
		err = s.network.SetGuestMAC(s.spec.Network.GuestMAC)
	} else {
		s.network, err = s.attach(*s.spec.Network)
	}
	if err != nil {
		return err
	}
	u.add(func() { _ = s.network.Close() })
	s.step(stepNetwork)
	return nil
}

// bringUp starts the VMM and waits until the guest is ready.
//
// Of some thousand boots under emulation one says nothing, ever: its CPUs do not get
// out of the kernel's first steps. As that has nothing to do with the guest, it is
// booted again, once, after a time in which any other boot is done.
func (s *process) bringUp(ctx context.Context) error {
	if s.instance != nil { // it stood by
		return s.wakeUp(ctx)
	}
	if patience := s.spec.ReadyTimeout / silentFraction; s.mayBeSilent() {
		attempt, cancel := context.WithTimeoutCause(ctx, patience, errSilent)
		err := s.attempt(attempt)
		cancel()
		if !errors.Is(err, errSilent) {
			return err
		}
		s.kill()
		s.instance, s.channel, s.timeline = nil, nil, s.timeline[:1]
		s.warn(fmt.Sprintf("the guest said nothing for %s and was booted again", patience))
	}
	return s.attempt(ctx)
}

// mayBeSilent reports whether the VM is of the kind that bringUp speaks of.
func (s *process) mayBeSilent() bool {
	return s.spec.VMM.Accelerator == vmm.TCG && s.spec.VMM.Restore == nil && s.spec.Hello != nil && s.network != nil
}

func (s *process) attempt(ctx context.Context) error {
	if err := s.startVMM(ctx); err != nil {
		return err
	}
	s.step(stepVMM)
	return s.awaitReady(ctx)
}

// warn tells the launcher, and whoever reads the log, of what did not go as it should.
func (s *process) warn(text string) {
	s.warnings = append(s.warnings, text)
	s.log.Warn(text, "vm", s.spec.ID)
}

// listen makes the two sockets. A runtime directory that is there already is of an
// earlier run whose shim was killed: the launcher holds the VM's lock.
func (s *process) listen() (control, agents net.Listener, err error) {
	dir := s.spec.RuntimeDir
	if err := os.RemoveAll(dir); err != nil {
		return nil, nil, fmt.Errorf("make sockets: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, nil, fmt.Errorf("make sockets: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("make sockets: %w", err)
	}
	control, err = stream.ListenUnix(shim.ControlSocket(dir))
	if err == nil {
		agents, err = stream.ListenUnix(shim.AgentSocket(dir))
	}
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	return control, agents, nil
}

func (s *process) startVMM(ctx context.Context) error {
	i := slices.IndexFunc(s.opts.Backends, func(b vmm.Backend) bool { return b.Name() == s.spec.Backend })
	if i < 0 {
		return fmt.Errorf("backend %q is not part of this program", s.spec.Backend)
	}
	config := s.spec.VMM
	if s.network != nil && config.NIC != nil {
		nic := *config.NIC
		link := s.network.Link()
		nic.Link, nic.TAP = link.Socket, link.TAP
		config.NIC = &nic
	}
	ctx, cancel := s.startContext(ctx)
	defer cancel()
	releaseData() // the VMM would inherit it
	instance, err := s.opts.Backends[i].Start(ctx, config)
	boundData()
	if err != nil {
		return s.explain(ctx, err)
	}
	s.instance, s.ran = instance, true
	go s.watchHalts(instance)
	return nil
}

// kill ends the VM without asking it. It is the undoing of a start.
func (s *process) kill() {
	if s.instance == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), quitTime)
	defer cancel()
	if err := s.instance.Kill(ctx); err != nil {
		s.log.Error("kill VMM", "error", err)
	}
	if s.link != nil {
		_ = s.link.Close()
	}
	if s.channel != nil {
		_ = s.channel.Close()
	}
}

// attend serves a VM that runs until it has ended, and ends it when it must.
func (s *process) attend(ctx context.Context) {
	switch s.awaitCommit(); {
	case isClosed(s.committed):
	case isClosed(s.instance.Done()):
		s.report(shim.Report{Failure: shim.NewFailure(fmt.Errorf("%w: %s", errVMMEnded, s.instance.Exit()))})
		return
	default:
		s.stop(shim.Stop{}, "its start was given up")
		return
	}
	step.Reached(ctx, "claim/confirmed")
	if err := s.takeOver(); err != nil {
		s.report(shim.Report{Failure: shim.NewFailure(err)})
		s.stop(shim.Stop{}, err.Error())
		return
	}
	step.Reached(ctx, "claim/taken over")
	s.report(shim.Report{Committed: true})
	_ = s.reports.Close()
	s.active()
	defer s.idle.Stop()
	s.awaitEnd(ctx)
}

// awaitEnd returns when the VM has ended, and ends it when it must. What makes it end may
// come while it is ended already, and then have it ended sooner.
func (s *process) awaitEnd(ctx context.Context) {
	var expired <-chan time.Time
	if s.spec.TTL > 0 {
		timer := time.NewTimer(s.spec.TTL)
		defer timer.Stop()
		expired = timer.C
	}
	owner, told := s.launcherGone, ctx.Done()
	if !s.spec.Ephemeral {
		owner = nil // the VM does not depend on it
	}
	var stops sync.WaitGroup
	defer stops.Wait()
	stop := func(how shim.Stop, reason string) { stops.Go(func() { s.stop(how, reason) }) }
	for {
		select {
		case <-s.instance.Done():
			return
		case <-expired:
			expired = nil
			stop(shim.Stop{Grace: stopGrace}, "its time to live is over")
		case <-owner:
			owner = nil
			stop(shim.Stop{}, "the process that it belongs to ended")
		case <-s.halts.tell:
			stops.Go(s.noteHalt)
		case <-told:
			told = nil
			stop(shim.Stop{Grace: stopGrace}, "its shim was told to end")
		}
	}
}

// awaitCommit waits until the launcher has confirmed the start, or can't any more. A
// launcher may be gone right after it has confirmed.
func (s *process) awaitCommit() {
	select {
	case <-s.committed:
	case <-s.launcherGone:
	case <-s.instance.Done():
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// recordOrphan writes down the end of a start whose launcher is no longer there to
// do it.
func (s *process) recordOrphan() error {
	if !isClosed(s.launcherGone) {
		return nil
	}
	return s.opts.Exited(context.Background(), shim.ExitRecord{
		ID:         s.spec.ID,
		Run:        s.spec.Run,
		Exit:       vmm.Exit{Reason: vmm.ExitKilled, Detail: errGivenUp.Error(), At: time.Now().UTC()},
		Origin:     s.spec.Origin,
		RuntimeDir: s.spec.RuntimeDir,
	})
}

// record writes down how the VM ended.
func (s *process) record() error {
	record := shim.ExitRecord{
		ID:         s.spec.ID,
		Run:        s.spec.Run,
		Exit:       s.instance.Exit(),
		Origin:     s.spec.Origin,
		RuntimeDir: s.spec.RuntimeDir,
		Committed:  isClosed(s.committed),
	}
	s.mu.Lock()
	record.Exit.Detail = strings.TrimSuffix(strings.Join(append(s.notes, record.Exit.Detail), "; "), "; ")
	s.mu.Unlock()
	if err := s.opts.Exited(context.Background(), record); err != nil {
		return fmt.Errorf("record the end of VM %q: %w", s.spec.ID, err)
	}
	return nil
}
