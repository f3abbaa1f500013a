package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
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
	// ErrEnded matches the error of a start whose VM has ended.
	ErrEnded  = errors.New("the VM ended while it was started")
	errSilent = errors.New("the guest says nothing")
)

// startContext is done when the start can't go on: its time is over, the VMM has ended or paused
// the guest, or outer is done. Its cause says which.
func (s *Session) startContext(outer context.Context) (context.Context, context.CancelFunc) {
	base, cancelCause := context.WithCancelCause(context.Background())
	timed, cancelTime := context.WithDeadlineCause(base, s.began.Add(s.spec.ReadyTimeout), smolvm.ErrBootTimeout)
	var vmmEnded <-chan struct{}
	if s.instance != nil {
		vmmEnded = s.instance.Done()
	}
	halted := s.halts.halted()
	go func() {
		select {
		case <-vmmEnded:
			cancelCause(ErrEnded)
		case <-halted:
			cancelCause(s.halts.err())
		case <-outer.Done():
			cancelCause(context.Cause(outer))
		case <-timed.Done():
		}
	}()
	return timed, func() {
		cancelTime()
		cancelCause(nil)
	}
}

// explain says why a start did not succeed, with the end of the console.
func (s *Session) explain(ctx context.Context, err error) error {
	if s.instance != nil && stream.IsBroken(err) && !s.resetsChannel() {
		// The channel breaks when the VMM ends, and that says more.
		select {
		case <-s.instance.Done():
		case <-ctx.Done():
		}
	}
	cause := context.Cause(ctx)
	if s.instance != nil && s.ended() {
		cause = ErrEnded
	}
	switch {
	case cause == nil:
	case errors.Is(cause, ErrEnded):
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
func (s *Session) consoleEnd() string {
	keeper, ok := s.instance.(vmm.Consoler)
	if !ok {
		return ""
	}
	return ring.LastLines(keeper.ConsoleTail(ring.QuoteBytes), ring.QuoteLines)
}

// awaitReady returns when the guest is ready, as the spec says.
func (s *Session) awaitReady(ctx context.Context) error {
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
	if err == nil {
		err = s.mount(ctx)
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
	s.step("ready")
	return nil
}

func (s *Session) handshake(ctx context.Context) error {
	// A guest that stood by has told who it was, over a channel that is open.
	channel, link, answer, err := s.greet(ctx, s.line.take(), s.hello(), s.spec.VMM.Restore != nil)
	if err != nil {
		return err
	}
	s.line.set(channel, link, answer)
	s.warnings = append(s.warnings, answer.Warnings...)
	s.checkAuthority(*answer)
	s.step(stepAgent)
	return nil
}

// awaitSSH returns when something answers on the guest's port 22 as an SSH server
// does.
func (s *Session) awaitSSH(ctx context.Context) error {
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

func (s *Session) hasSSH(ctx context.Context) bool {
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
