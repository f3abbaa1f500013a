// Package session is one guest from the start of its VMM to the VMM's end, with its network
// and its agent: bring it up, tell it who it is, pause, save and stop it. It knows of no
// launcher, socket or slot: those are of the process that it runs in.
package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/health"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Options of a [Session].
type Options struct {
	// Backend runs the VM.
	Backend vmm.Backend
	// Attach makes the VM's network, and warns of what that can't do on this host.
	Attach func(config network.Config, warn func(string)) (network.Attachment, error)
	Log    *slog.Logger
	// Accepted is called for each connection that comes by a port forward of TCP. Nil: nobody
	// wants to know.
	Accepted func(from net.Addr, guestPort int)
	// StartVMM calls its argument, which starts the VMM: what limits the process that the VMM
	// would inherit is lifted meanwhile. Nil: it is just called.
	StartVMM func(start func())
}

// Session is one guest. It is brought up by [Session.Connect] and [Session.Boot], and ended by
// [Session.Close].
type Session struct {
	// Reach is whether the guest's agent can be reached.
	Reach *Reach

	opts  Options
	spec  shim.Spec
	log   *slog.Logger
	began time.Time

	network network.Attachment // nil: the VM has none
	mtu     int                // of it, in bytes; zero: the guest's own
	// placeholders is nil if the VM has no secrets.
	placeholders *placeholders
	mounts       mounts
	instance     vmm.Instance // nil before the VMM is started
	ran          bool         // the guest's CPUs have run
	line         line         // to the guest's agent
	timeline     []wire.Step
	warnings     []string

	paused atomic.Bool
	halts  *halts
	holds  atomic.Int64 // how often the guest was paused
	saving sync.Mutex   // held by Save

	mu          sync.Mutex // guards the following
	consolePath string
	forwards    map[shim.Forward]io.Closer
	notes       []string        // why and how the VM was stopped
	health      *health.Monitor // nil: no checks are made, or not yet
}

// New returns the session of the VM of a spec. Nothing of it runs.
func New(spec shim.Spec, opts Options) *Session {
	return &Session{
		opts: opts, spec: spec, log: opts.Log, began: time.Now(), halts: newHalts(), Reach: newReach(),
		consolePath: spec.VMM.ConsolePath, forwards: map[shim.Forward]io.Closer{},
	}
}

// Connect makes the VM's network, if it is to have one.
func (s *Session) Connect() error {
	if s.spec.Network == nil {
		return s.useSecrets()
	}
	attached, err := s.opts.Attach(*s.spec.Network, s.warn)
	if err != nil {
		return err
	}
	s.network, s.mtu = attached, s.spec.Network.MTU
	if s.spec.Network.Egress != nil {
		// It is in force already, or the network knows of no policies.
		if err := s.setEgress(*s.spec.Network.Egress); err != nil {
			return err
		}
	}
	if err := s.useSecrets(); err != nil {
		return err
	}
	s.step(stepNetwork)
	return nil
}

// Claim makes the session that of another spec, of a VM that goes on where this one was
// paused. Console is where the console's log is for now. The timeline begins anew.
func (s *Session) Claim(spec shim.Spec, console string) {
	s.spec, s.began, s.timeline = spec, time.Now(), nil
	s.SetConsole(console)
}

// SetConsole tells where the console's log is now.
func (s *Session) SetConsole(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.consolePath = path
}

func (s *Session) console() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.consolePath
}

// Boot starts the VMM and returns when the guest is ready. If ctx is done before, its cause
// is the error's. On failure the VMM may run: [Session.Close] ends it.
//
// Of some thousand boots under emulation one says nothing, ever: its CPUs do not get
// out of the kernel's first steps. As that has nothing to do with the guest, it is
// booted again, once, after a time in which any other boot is done.
func (s *Session) Boot(ctx context.Context) error {
	if patience := s.spec.ReadyTimeout / silentFraction; s.mayBeSilent() {
		before := len(s.timeline)
		attempt, cancel := context.WithTimeoutCause(ctx, patience, errSilent)
		err := s.attempt(attempt)
		cancel()
		if !errors.Is(err, errSilent) {
			return err
		}
		s.kill()
		s.line.reset()
		s.instance, s.timeline = nil, s.timeline[:before]
		s.warn(fmt.Sprintf("the guest said nothing for %s and was booted again", patience))
	}
	return s.attempt(ctx)
}

// mayBeSilent reports whether the VM is of the kind that Boot speaks of.
func (s *Session) mayBeSilent() bool {
	return s.spec.VMM.Accelerator == vmm.TCG && s.spec.VMM.Restore == nil && s.spec.Hello != nil
}

func (s *Session) attempt(ctx context.Context) error {
	if err := s.startVMM(ctx); err != nil {
		return err
	}
	s.step(stepVMM)
	return s.awaitReady(ctx)
}

// Reconnect makes the network that of the VM that the session was claimed for.
func (s *Session) Reconnect() error {
	if s.spec.Network == nil || s.network == nil {
		return s.useSecrets()
	}
	if err := s.claimNetwork(); err != nil {
		return err
	}
	if egress := s.spec.Network.Egress; egress != nil {
		if err := s.setEgress(*egress); err != nil {
			return err
		}
	}
	if err := s.useSecrets(); err != nil {
		return err
	}
	s.step(stepNetwork)
	return nil
}

// claimTime is far more than others who change networks before need.
const claimTime = 30 * time.Second

// claimNetwork makes the network that stood by that of the VM.
func (s *Session) claimNetwork() error {
	claimer, ok := s.network.(network.Claimer)
	if !ok {
		return s.network.SetGuestMAC(s.spec.Network.GuestMAC)
	}
	ctx, cancel := context.WithTimeout(context.Background(), claimTime)
	defer cancel()
	if err := claimer.Claim(ctx, *s.spec.Network, s.spec.ID); err != nil {
		return err
	}
	if problem, ok := s.network.(interface{ Problem() error }); ok && problem.Problem() != nil {
		s.warn(problem.Problem().Error())
	}
	return nil
}

// WakeUp lets a guest that was paused go on as what it was claimed for, and returns when it is
// ready; see [Session.Claim] and [Session.Boot].
func (s *Session) WakeUp(ctx context.Context) error {
	bounded, cancel := s.startContext(ctx)
	defer cancel()
	if err := s.limit(bounded); err != nil {
		return err
	}
	if pauser, ok := s.instance.(vmm.Pauser); ok {
		if err := pauser.Resume(bounded); err != nil {
			return s.explain(bounded, err)
		}
		s.setPaused(false)
	}
	s.step(stepVMM)
	return s.awaitReady(ctx)
}

func (s *Session) startVMM(ctx context.Context) error {
	config := s.spec.VMM
	if s.network != nil && config.NIC != nil {
		nic := *config.NIC
		link := s.network.Link()
		nic.Link, nic.TAP = link.Socket, link.TAP
		config.NIC = &nic
	}
	ctx, cancel := s.startContext(ctx)
	defer cancel()
	var instance vmm.Instance
	var err error
	start := func() { instance, err = s.opts.Backend.Start(ctx, config) }
	if s.opts.StartVMM != nil {
		s.opts.StartVMM(start)
	} else {
		start()
	}
	if err != nil {
		return s.explain(ctx, err)
	}
	s.instance, s.ran = instance, true
	go s.watchHalts(instance)
	return nil
}

// setEgress puts the egress policy of an order in force.
func (s *Session) setEgress(egress network.Egress) error {
	setter, ok := s.network.(network.EgressSetter)
	if !ok {
		return fmt.Errorf("set the egress policy: %w: the VM's network can't have one", smolvm.ErrUnsupported)
	}
	return setter.SetEgress(egress)
}

// limit gives a VM that was claimed the limits of the one that it is to be.
func (s *Session) limit(ctx context.Context) error {
	if want := s.spec.VMM.DiskLimit; want != (vmm.DiskLimit{}) {
		limiter, ok := s.instance.(vmm.DiskLimiter)
		if !ok {
			return fmt.Errorf("limit the speed of the VM's disks: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
		}
		if err := limiter.SetDiskLimit(ctx, want); err != nil {
			return err
		}
	}
	if s.spec.VMM.CPULimit == 0 {
		return nil
	}
	limiter, ok := s.instance.(vmm.Limiter)
	if !ok {
		return fmt.Errorf("limit the VM's CPU time: %w by backend %s", smolvm.ErrUnsupported, s.spec.Backend)
	}
	return limiter.SetCPULimit(ctx, s.spec.VMM.CPULimit)
}

// kill ends the VM without asking it.
func (s *Session) kill() {
	if s.instance == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), quitTime)
	defer cancel()
	if err := s.instance.Kill(ctx); err != nil {
		s.log.Error("kill VMM", "error", err)
	}
	s.line.close()
	s.mounts.close()
}

// Close ends the VM, if it runs, and its network.
func (s *Session) Close() {
	s.kill()
	if s.network != nil {
		if err := s.network.Close(); err != nil {
			s.log.Error("remove the VM's network", "error", err)
		}
	}
}

// Done is closed when the VM has ended. There is none before the VMM was started.
func (s *Session) Done() <-chan struct{} { return s.instance.Done() }

// ended reports whether the VM has ended.
func (s *Session) ended() bool {
	select {
	case <-s.instance.Done():
		return true
	default:
		return false
	}
}

// Exit returns how the VM has ended, and with it why it was stopped.
func (s *Session) Exit() vmm.Exit {
	exit := s.instance.Exit()
	s.mu.Lock()
	defer s.mu.Unlock()
	exit.Detail = strings.TrimSuffix(strings.Join(append(s.notes, exit.Detail), "; "), "; ")
	return exit
}

// Ran reports whether the guest's CPUs have run.
func (s *Session) Ran() bool { return s.ran }

// Status returns what is known of a VM that runs.
func (s *Session) Status() shim.Status {
	answer, end := s.line.told()
	status := shim.Status{
		ID: s.spec.ID, Run: s.spec.Run, VMMPID: s.instance.PID(), Uptime: time.Since(s.began),
		Halt: s.halts.why(), Forwards: s.allForwards(), Health: s.foundHealth(), Answer: answer,
		Unreachable: s.Reach.Lost(), ChannelEnd: end,
	}
	if setter, ok := s.network.(network.EgressSetter); ok {
		status.EgressRevision = setter.EgressRevision()
	}
	return status
}

// Report returns what a launcher is told when the guest is ready.
func (s *Session) Report() shim.Report {
	answer, _ := s.line.told()
	report := shim.Report{VMMPID: s.instance.PID(), Answer: answer, Timeline: s.timeline, Warnings: s.warnings}
	if limiter, ok := s.instance.(vmm.Limiter); ok {
		report.Limits = limiter.Limits()
	}
	return report
}

// Network returns the VM's network. The error matches [smolvm.ErrUnsupported] if it has none.
func (s *Session) Network() (network.Attachment, error) {
	if s.network == nil {
		return nil, fmt.Errorf("%w: the VM has no network", smolvm.ErrUnsupported)
	}
	return s.network, nil
}

// DialAgent opens a connection to the guest's agent. The error says why there is none.
func (s *Session) DialAgent(ctx context.Context) (net.Conn, error) {
	if err := s.halts.err(); err != nil && s.line.current() != nil {
		return nil, err
	}
	link, err := s.agentLink(ctx)
	if errors.Is(err, errNoAgent) {
		return nil, errors.New("this guest has no agent of smolvm")
	}
	var conn net.Conn
	if err == nil {
		conn, err = link.Open(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("the guest's agent does not answer any more: %w", err)
	}
	return conn, nil
}

// step notes that a step of the start is done.
func (s *Session) step(name string) {
	s.timeline = append(s.timeline, wire.Step{Name: name, At: time.Since(s.began)})
}

// warn tells the launcher, and whoever reads the log, of what did not go as it should.
func (s *Session) warn(text string) {
	s.warnings = append(s.warnings, text)
	s.log.Warn(text, "vm", s.spec.ID)
}
