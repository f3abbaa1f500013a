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
	"sync"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/compat"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/session"
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
	// Reached is called when the agent of a guest that runs can't be reached any more, and
	// when it can be again. Nil: nobody wants to know.
	Reached func(context.Context, shim.HaltRecord) error
	// Healthy is called when the status of the guest's health has changed. Nil: nobody wants to
	// know.
	Healthy func(context.Context, shim.HealthRecord) error
}

// process is the running shim.
type process struct {
	spec     shim.Spec
	opts     Options
	log      *slog.Logger
	launcher *launcher
	slot     *slotFiles // nil unless the shim stood by, and the start is not confirmed yet
	session  *session.Session
	idle     *time.Timer // see active
	flows    network.LateRecorder
	calls    calls

	mu       sync.Mutex     // guards the following
	ended    bool           // no more requests are taken
	requests sync.WaitGroup // counts those being answered
}

var (
	errGivenUp   = errors.New("the process that started the VM is gone")
	errUnplugged = errors.New("shim was told to end")
)

// Main runs one VM from its start to its end. ctx being done stops the VM in an
// orderly way.
func Main(ctx context.Context, opts Options) error {
	limitMemory()
	raiseOpenFiles()
	s := &process{
		opts: opts,
		log:  slog.New(slog.NewTextHandler(ring.Over(os.Stderr, ring.LogBytes), nil)),
		idle: time.AfterFunc(time.Hour, releaseMemory),
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
	s.launcher = follow(orders, os.NewFile(shim.ReportsFD, "reports"), s.log)
	if s.session, err = s.newSession(); err != nil {
		s.launcher.report(shim.Report{Failure: shim.NewFailure(err)})
		return err
	}
	switch {
	case s.spec.Freeze != nil:
		return s.freeze(ctx, *s.spec.Freeze)
	case s.spec.Standby:
		listeners, claimed, err := s.standBy(ctx)
		if err != nil || !claimed {
			return err
		}
		return s.logged(s.run(ctx, bringUp{
			listeners: func() ([]io.Closer, error) { return listeners, nil },
			connect:   s.session.Reconnect, boot: s.session.WakeUp,
		}))
	}
	return s.logged(s.run(ctx, bringUp{
		listeners: func() ([]io.Closer, error) { return inheritListeners(s.spec.Forwards) },
		connect:   s.session.Connect, boot: s.session.Boot,
	}))
}

// bringUp is how a VM comes up: it boots, or is restored, or it stood by and wakes up.
type bringUp struct {
	// listeners returns those of the VM's forwards, in the order of the spec.
	listeners func() ([]io.Closer, error)
	connect   func() error
	boot      func(context.Context) error
}

func (s *process) logged(err error) error {
	if err != nil {
		s.log.Error("shim failed", "vm", s.spec.ID, "error", err)
	}
	return err
}

// newSession returns the session of the VM.
func (s *process) newSession() (*session.Session, error) {
	i := slices.IndexFunc(s.opts.Backends, func(b vmm.Backend) bool { return b.Name() == s.spec.Backend })
	if i < 0 {
		return nil, fmt.Errorf("backend %q is not part of this program", s.spec.Backend)
	}
	return session.New(s.spec, session.Options{
		Backend: s.opts.Backends[i], Attach: s.attach, Log: s.log,
		Accepted: func(from net.Addr, guestPort int) { s.recordForward(from.String(), guestPort) },
		StartVMM: func(start func()) {
			releaseData() // the VMM would inherit it
			start()
			boundData()
		},
	}), nil
}

// active notes that something happened; memory is given back when nothing has for a
// while.
func (s *process) active() { s.idle.Reset(quiet) }

// starting is done when nobody wants the start any more. Its cause says why.
func (s *process) starting(ctx context.Context) (context.Context, func()) {
	wanted, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	gone := s.launcher.gone // a claim brings another launcher
	go func() {
		select {
		case <-gone:
			cancel(errGivenUp)
		case <-ctx.Done():
			cancel(errUnplugged)
		case <-wanted.Done():
		}
	}()
	return wanted, func() { cancel(nil) }
}

// run brings a VM up, and serves it to its end.
func (s *process) run(ctx context.Context, up bringUp) error {
	endFlows := s.beginFlows()
	undo, err := s.start(ctx, up)
	closeAll := func() {
		undo()
		endFlows()
	}
	defer closeAll()
	if err != nil {
		closeAll()
		failed := shim.NewFailure(err)
		failed.Ran = s.session.Ran()
		s.launcher.report(shim.Report{Failure: failed})
		return errors.Join(err, s.recordOrphan())
	}
	ready := s.session.Report()
	ready.PID, ready.Start, ready.VMMStart = os.Getpid(), startOf(os.Getpid()), startOf(ready.VMMPID)
	s.launcher.report(ready)
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
func (s *process) start(ctx context.Context, up bringUp) (undo func(), err error) {
	var u cleanupStack
	control, agents, err := s.listen()
	if err != nil {
		return u.run, err
	}
	u.add(func() {
		_, _ = control.Close(), agents.Close()
		_ = os.RemoveAll(s.spec.RuntimeDir)
	})
	u.add(s.session.Close)
	if err := up.connect(); err != nil {
		return u.run, err
	}
	listeners, err := up.listeners()
	if err != nil {
		return u.run, err
	}
	for i, forward := range s.spec.Forwards {
		if err := s.session.Forwards().Serve(forward, listeners[i]); err != nil {
			return u.run, err
		}
	}
	starting, cancel := s.starting(ctx)
	defer cancel()
	if err := up.boot(starting); err != nil {
		return u.run, err
	}
	go s.serveControl(control)
	go s.serveAgents(agents)
	return u.run, nil
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

// attend serves a VM that runs until it has ended, and ends it when it must.
func (s *process) attend(ctx context.Context) {
	switch s.awaitCommit(); {
	case isClosed(s.launcher.committed):
	case isClosed(s.session.Done()):
		s.launcher.report(shim.Report{Failure: shim.NewFailure(fmt.Errorf("%w: %s", session.ErrEnded, s.session.Exit()))})
		return
	default:
		s.session.Stop(shim.Stop{}, "its start was given up")
		return
	}
	step.Reached(ctx, "claim/confirmed")
	if err := s.takeOver(); err != nil {
		s.launcher.report(shim.Report{Failure: shim.NewFailure(err)})
		s.session.Stop(shim.Stop{}, err.Error())
		return
	}
	step.Reached(ctx, "claim/taken over")
	s.launcher.report(shim.Report{Committed: true})
	s.launcher.close()
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
	owner, told := s.launcher.gone, ctx.Done()
	if !s.spec.Ephemeral {
		owner = nil // the VM does not depend on it
	}
	var stops sync.WaitGroup
	defer stops.Wait()
	stop := func(how shim.Stop, reason string) { stops.Go(func() { s.session.Stop(how, reason) }) }
	checking, endChecks := context.WithCancel(context.WithoutCancel(ctx))
	defer endChecks()
	stops.Go(func() { s.session.WatchHealth(checking, s.noteHealth) })
	for {
		select {
		case <-s.session.Done():
			return
		case <-expired:
			expired = nil
			stop(shim.Stop{Grace: session.StopGrace}, "its time to live is over")
		case <-owner:
			owner = nil
			stop(shim.Stop{}, "the process that it belongs to ended")
		case <-s.session.Halted():
			stops.Go(s.noteHalt)
		case <-s.session.Reach.Changed():
			stops.Go(s.noteReach)
		case <-told:
			told = nil
			stop(shim.Stop{Grace: session.StopGrace}, "its shim was told to end")
		}
	}
}

// awaitCommit waits until the launcher has confirmed the start, or can't any more. A
// launcher may be gone right after it has confirmed.
func (s *process) awaitCommit() {
	select {
	case <-s.launcher.committed:
	case <-s.launcher.gone:
	case <-s.session.Done():
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
	if !isClosed(s.launcher.gone) {
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
		Exit:       s.session.Exit(),
		Origin:     s.spec.Origin,
		RuntimeDir: s.spec.RuntimeDir,
		Committed:  isClosed(s.launcher.committed),
	}
	if err := s.opts.Exited(context.Background(), record); err != nil {
		return fmt.Errorf("record the end of VM %q: %w", s.spec.ID, err)
	}
	return nil
}

// noteHalt writes down that the guest was paused by its VMM.
func (s *process) noteHalt() {
	if why := s.session.TakeHalt(); why != "" {
		s.writeDown(s.opts.Halted, why)
	}
}

// noteReach writes down whether the guest's agent can be reached.
func (s *process) noteReach() { s.writeDown(s.opts.Reached, s.session.Reach.Lost()) }

// noteHealth writes down that the status of the guest's health has changed.
func (s *process) noteHealth(found smolvm.Health) {
	if s.opts.Healthy == nil {
		return
	}
	err := s.opts.Healthy(context.Background(), shim.HealthRecord{ID: s.spec.ID, Run: s.spec.Run, Health: found, Origin: s.spec.Origin})
	if err != nil {
		s.log.Error("write down the guest's health", "status", found.Status, "error", err)
	}
}

func (s *process) writeDown(record func(context.Context, shim.HaltRecord) error, cause string) {
	if record == nil {
		return
	}
	err := record(context.Background(), shim.HaltRecord{ID: s.spec.ID, Run: s.spec.Run, Cause: cause, Origin: s.spec.Origin})
	if err != nil {
		s.log.Error("write down what became of the guest", "cause", cause, "error", err)
	}
}
