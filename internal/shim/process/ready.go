package process

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// seedSize is how much entropy a guest is given: what its kernel's generator
	// can hold.
	seedSize = 32
	// A guest's SSH server can't tell us that it has come up, so it is tried again
	// and again, at intervals that grow from the first to the last.
	firstRetry, lastRetry = 20 * time.Millisecond, 500 * time.Millisecond
	// silentFraction of the time for a boot is what a guest may be silent for; see
	// bringUp. Of the usual two minutes that is 30 s; a boot takes 2 s, on a busy host
	// 10.
	silentFraction = 4
)

// The steps of a start that a shim tells of.
const (
	stepNetwork = "network"
	stepVMM     = "VMM"
	stepAgent   = "agent"
)

var (
	errVMMEnded  = errors.New("the VM ended while it was started")
	errGivenUp   = errors.New("the process that started the VM is gone")
	errUnplugged = errors.New("shim was told to end")
	errSilent    = errors.New("the guest says nothing")
)

// startContext is done when the start can't go on: its time is over, the VMM has
// ended, or the launcher is gone. Its cause says which.
func (s *process) startContext(ctx context.Context) (context.Context, context.CancelFunc) {
	outer := ctx
	base, cancelCause := context.WithCancelCause(context.Background())
	timed, cancelTime := context.WithDeadlineCause(base, s.began.Add(s.spec.ReadyTimeout), smolvm.ErrBootTimeout)
	var vmmEnded <-chan struct{}
	if s.instance != nil {
		vmmEnded = s.instance.Done()
	}
	halted, launcherGone := s.halts.halted(), s.launcherGone // a claim brings another launcher
	go func() {
		select {
		case <-vmmEnded:
			cancelCause(errVMMEnded)
		case <-halted:
			cancelCause(s.halts.err())
		case <-launcherGone:
			cancelCause(errGivenUp)
		case <-outer.Done():
			if errors.Is(context.Cause(outer), errSilent) {
				cancelCause(errSilent)
				return
			}
			cancelCause(errUnplugged)
		case <-timed.Done():
		}
	}()
	return timed, func() {
		cancelTime()
		cancelCause(nil)
	}
}

// explain says why a start did not succeed, with the end of the console.
func (s *process) explain(ctx context.Context, err error) error {
	if s.instance != nil && stream.IsBroken(err) {
		// The channel breaks when the VMM ends, and that says more.
		select {
		case <-s.instance.Done():
		case <-ctx.Done():
		}
	}
	cause := context.Cause(ctx)
	if s.instance != nil && isClosed(s.instance.Done()) {
		cause = errVMMEnded
	}
	switch {
	case cause == nil:
	case errors.Is(cause, errVMMEnded):
		err = errors.New(s.instance.Exit().String())
	case errors.Is(cause, smolvm.ErrBootTimeout):
		err = fmt.Errorf("%w: not ready after %s (by %q); give it a longer timeout if the host is slow",
			smolvm.ErrBootTimeout, s.spec.ReadyTimeout, s.spec.Ready)
	default:
		err = cause
	}
	if s.instance == nil {
		return err
	}
	if console := s.consoleEnd(); console != "" {
		return fmt.Errorf("%w; the console ends with: %s", err, console)
	}
	return fmt.Errorf("%w; the console is empty", err)
}

// consoleEnd is the end of the guest's console in this run, as one line.
func (s *process) consoleEnd() string {
	keeper, ok := s.instance.(vmm.Consoler)
	if !ok {
		return ""
	}
	return ring.LastLines(keeper.ConsoleTail(ring.QuoteBytes), ring.QuoteLines)
}

// awaitReady returns when the guest is ready, as the spec says.
func (s *process) awaitReady(ctx context.Context) error {
	ctx, cancel := s.startContext(ctx)
	defer cancel()
	var err error
	switch {
	case s.spec.Hello != nil:
		// Even if nobody waits for it, the agent must be told who it is.
		err = s.handshake(ctx)
	case s.spec.Ready == smolvm.ReadyAgent:
		err = errors.New("a VM without an agent can't become ready by it")
	}
	if err == nil && s.spec.WarmUp != "" {
		err = s.runInGuest(ctx, smolvm.Command{Args: []string{"sh", "-c", s.spec.WarmUp}})
		s.step("warm-up")
	}
	if err == nil && s.spec.Ready == smolvm.ReadySSH {
		err = s.awaitSSH(ctx)
	}
	if err != nil {
		return s.explain(ctx, err)
	}
	return nil
}

func (s *process) handshake(ctx context.Context) error {
	hello := *s.spec.Hello
	hello.Time = time.Now()
	hello.Seed = make([]byte, seedSize)
	_, _ = rand.Read(hello.Seed) // never fails: crypto/rand ends the program instead
	if hello.Network != nil && s.network != nil {
		network := *hello.Network
		network.Search = s.network.Search()
		hello.Network = &network
	}
	if s.channel == nil { // a guest that stood by has told it who it was before
		channel, err := s.instance.OpenChannel(ctx)
		if err != nil {
			return err
		}
		s.channel = channel
	}
	if s.spec.InSession {
		if err := agent.Reset(ctx, s.channel); err != nil {
			return err
		}
	}
	link, answer, err := agent.Handshake(ctx, s.channel, hello)
	if err != nil {
		return err
	}
	s.link, s.answer = link, &answer
	s.warnings = append(s.warnings, answer.Warnings...)
	s.step(stepAgent)
	return nil
}

// awaitSSH returns when something answers on the guest's port 22 as an SSH server
// does.
func (s *process) awaitSSH(ctx context.Context) error {
	if s.network == nil {
		return errors.New("a VM without a network can't be reached by SSH")
	}
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		if s.hasSSH(ctx) {
			return nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *process) hasSSH(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 10*lastRetry)
	defer cancel()
	conn, err := s.network.DialGuest(ctx, wire.SSHPort)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	banner := make([]byte, len("SSH-"))
	_, err = io.ReadFull(conn, banner)
	return err == nil && strings.HasPrefix(string(banner), "SSH-")
}
