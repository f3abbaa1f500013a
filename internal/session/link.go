package session

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/smolvm/smolvm/internal/agent"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// maxOpenings is how often a channel is opened that the guest's end resets each time.
	maxOpenings = 5
	// checkTime bounds how long a guest may take to show that it has its channel still.
	checkTime = 10 * time.Second
)

// endedBySaving is why calls have ended that were under way when the VM was saved.
const endedBySaving = "saving the VM ended it: this backend resets the guest channel then"

var (
	// errUnanswered ends an opening of a channel that the guest may have reset unnoticed.
	errUnanswered = errors.New("the guest's agent did not answer")
	// errLinkClosed ends what waits for a session's link when the VM ends.
	errLinkClosed = errors.New("the VM has ended")
	// errPaused is why a link that has ended is not opened again for now.
	errPaused = errors.New("the guest channel was reset when the paused VM was saved, and is opened again when the VM is resumed")
)

// line is a session's connection to the guest's agent. It may have to be made anew while the VM
// runs; see [vmm.ChannelResetter].
type line struct {
	mu      sync.Mutex
	channel vmm.Channel   // nil while it has not been opened
	link    *agent.Link   // nil without an agent, or after a rehearsal
	answer  *wire.Answer  // the last one
	opening chan struct{} // closed when the opening under way is over; nil: there is none
	failed  error         // why the last opening failed
	end     *shim.ChannelEnd
	closed  bool // the VM is being ended
}

// set puts a link in place. It is closed at once if the VM is being ended.
func (l *line) set(channel vmm.Channel, link *agent.Link, answer *wire.Answer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_, _ = link.Close(), channel.Close()
	}
	l.channel, l.link, l.answer, l.failed = channel, link, answer, nil
}

// current returns the link, which may have ended; nil: there is none.
func (l *line) current() *agent.Link {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.link
}

// release leaves the channel open, without a link.
func (l *line) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.link = nil
}

// told returns the guest's last answer, and how the line was last hung up.
func (l *line) told() (*wire.Answer, *shim.ChannelEnd) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.answer, l.end
}

// failure returns why the last opening failed; nil: it did not.
func (l *line) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failed
}

// take returns the channel that is open, and makes it the caller's.
func (l *line) take() vmm.Channel {
	l.mu.Lock()
	defer l.mu.Unlock()
	channel := l.channel
	l.channel = nil
	return channel
}

// hangUp ends the link, and with it all calls, which can ask why. Empty: it is over already.
func (l *line) hangUp(why string) {
	l.mu.Lock()
	link, channel := l.link, l.channel
	if link != nil && why != "" {
		l.end = &shim.ChannelEnd{At: time.Now(), Why: why}
	}
	l.channel = nil
	l.mu.Unlock()
	closeLine(link, channel)
}

// close ends the link and the channel for good.
func (l *line) close() {
	l.mu.Lock()
	link, channel := l.link, l.channel
	l.closed = true
	l.mu.Unlock()
	closeLine(link, channel)
}

func closeLine(link *agent.Link, channel vmm.Channel) {
	if link != nil {
		_ = link.Close()
	}
	if channel != nil {
		_ = channel.Close()
	}
}

// reset makes the line that of a VMM that is started anew.
func (l *line) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.channel, l.link, l.closed = nil, nil, false
}

func isOver(link *agent.Link) bool {
	select {
	case <-link.Done():
		return true
	default:
		return false
	}
}

// resetsChannel reports whether the VM is one whose channel is reset by a save, and may be
// opened again.
func (s *Session) resetsChannel() bool {
	resetter, ok := s.instance.(vmm.ChannelResetter)
	return ok && resetter.ResetsChannel()
}

// mayReopen reports whether a link that has ended may be opened again: not if the guest has broken
// the protocol, or takes nothing any more.
func (s *Session) mayReopen(link *agent.Link) bool { return s.resetsChannel() && link.Fault() == nil }

// agentLink returns the link to the guest's agent. One that was reset is opened again, and ctx
// bounds the waiting for it. Without an agent it is [errNoAgent]. A link that can't be opened
// again is returned as it is: its calls tell why.
func (s *Session) agentLink(ctx context.Context) (*agent.Link, error) {
	for tried := false; ; tried = true {
		s.line.mu.Lock()
		link, opening := s.line.link, s.line.opening
		s.line.mu.Unlock()
		switch {
		case opening != nil:
			select {
			case <-opening:
				continue
			case <-ctx.Done():
				return nil, fmt.Errorf("wait until the guest channel is open again: %w", context.Cause(ctx))
			}
		case link == nil:
			return nil, errNoAgent
		case !isOver(link) || !s.mayReopen(link):
			return link, nil
		case s.ended():
			return nil, errLinkClosed
		case s.paused.Load():
			return nil, errPaused
		case tried:
			return link, s.line.failure()
		}
		s.reopen()
	}
}

// reopen begins to open the channel again, unless that is under way. It goes on without its
// caller, at most for as long as a start may take.
func (s *Session) reopen() {
	s.line.mu.Lock()
	defer s.line.mu.Unlock()
	if s.line.opening != nil || s.line.closed || s.line.link == nil {
		return
	}
	opening := make(chan struct{})
	s.line.opening = opening
	go func() {
		began := time.Now()
		err := s.openAgain()
		if err != nil {
			err = fmt.Errorf("open the guest channel again: %w", err)
		}
		s.line.mu.Lock()
		s.line.opening, s.line.failed = nil, err
		close(opening)
		s.line.mu.Unlock()
		switch {
		case s.ended(): // and that says more
		case err != nil:
			s.log.Warn("the guest's agent can't be reached", "error", err)
			s.Reach.set(err)
		default:
			s.log.Info("the guest channel is open again", "took", time.Since(began))
			s.Reach.set(nil)
		}
	}()
}

// openAgain opens the channel again, and tells the guest once more who it is.
func (s *Session) openAgain() error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), s.spec.ReadyTimeout, errUnanswered)
	defer cancel()
	go func() {
		select {
		case <-s.instance.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	s.line.hangUp("") // it is over, but may hold the channel
	hello := s.hello()
	hello.Continues = true
	channel, link, answer, err := s.greet(ctx, nil, hello, true)
	if err != nil {
		return err
	}
	link.SetHeld(s.paused.Load())
	s.line.set(channel, link, answer)
	return nil
}

// greet tells the guest who it is, over a channel that is open, or one that it opens. Where the
// guest may reset the channel, that is tried again, and if the guest may do so unnoticed
// (mayBeLost) an answer is not waited for as long as the first time.
func (s *Session) greet(ctx context.Context, channel vmm.Channel, hello wire.Hello, mayBeLost bool) (vmm.Channel, *agent.Link, *wire.Answer, error) {
	for n := 1; ; n++ {
		link, answer, err := s.greetOnce(ctx, &channel, hello, mayBeLost && n < maxOpenings)
		if err == nil {
			return channel, link, &answer, nil
		}
		wasReset := stream.IsBroken(err) || errors.Is(err, errUnanswered) && ctx.Err() == nil
		if n == maxOpenings || channel == nil || !wasReset || !s.resetsChannel() || s.ended() || ctx.Err() != nil {
			return channel, nil, nil, err
		}
		_ = channel.Close()
		channel = nil
	}
}

// greetOnce is one try of greet. What it has opened is in channel even if it fails.
func (s *Session) greetOnce(ctx context.Context, channel *vmm.Channel, hello wire.Hello, mayBeLost bool) (*agent.Link, wire.Answer, error) {
	if *channel == nil {
		opened, err := s.instance.OpenChannel(ctx)
		if err != nil {
			return nil, wire.Answer{}, err
		}
		*channel = opened
	}
	resets := s.resetsChannel()
	if resets && mayBeLost {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.spec.ReadyTimeout/silentFraction, errUnanswered)
		defer cancel()
	}
	if s.spec.InSession && !resets {
		if err := agent.Reset(ctx, *channel); err != nil {
			return nil, wire.Answer{}, err
		}
	}
	hello.Time = time.Now()
	return agent.Handshake(ctx, *channel, hello)
}

// configured is a network that may have come out as less than it was to be: without IPv6, if
// the host has none.
type configured interface{ Config() network.Config }

// hello is what the guest is told now of who it is.
func (s *Session) hello() wire.Hello {
	hello := *s.spec.Hello
	hello.Seed = make([]byte, seedSize)
	_, _ = rand.Read(hello.Seed) // never fails: crypto/rand ends the program instead
	if hello.Network != nil && s.network != nil {
		told := *hello.Network
		// The network is as it was made, whoever has claimed it since.
		told.Search, told.MTU = s.network.Search(), s.mtu
		if made, ok := s.network.(configured); ok && !made.Config().Guest6.IsValid() {
			told.Address6, told.Gateway6 = netip.Prefix{}, netip.Addr{}
		}
		hello.Network = &told
	}
	s.placeholders.addTo(&hello)
	hello.Mounts = len(s.spec.Mounts)
	return hello
}

// afterSave ends the link of a guest that was saved, if that has reset it.
func (s *Session) afterSave() {
	if s.resetsChannel() {
		s.line.hangUp(endedBySaving)
	}
}

// afterHold opens a link that has ended again, if the guest runs, and reports whether it does.
func (s *Session) afterHold() bool {
	link := s.line.current()
	if link == nil || !isOver(link) || !s.resetsChannel() || s.paused.Load() {
		return false
	}
	s.reopen()
	return true
}

// checkLink finds out whether a save that has failed has reset the channel all the same.
func (s *Session) checkLink() {
	link := s.line.current()
	if link == nil || !s.resetsChannel() || s.paused.Load() {
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), checkTime)
		defer cancel()
		if link.Ping(ctx) == nil || s.line.current() != link {
			return
		}
		s.line.hangUp(endedBySaving)
		s.afterHold()
	}()
}

// Reach is whether the guest's agent can be reached while the guest runs.
type Reach struct {
	mu      sync.Mutex
	why     string        // it can't be; empty: it can
	changed chan struct{} // receives when that has changed
}

func newReach() *Reach { return &Reach{changed: make(chan struct{}, 1)} }

func (r *Reach) set(err error) {
	why := ""
	if err != nil {
		why = err.Error()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.why == why {
		return
	}
	r.why = why
	select {
	case r.changed <- struct{}{}:
	default: // it will be told of this one
	}
}

// Changed receives when the agent has become unreachable, or can be reached again.
func (r *Reach) Changed() <-chan struct{} { return r.changed }

// Lost returns why the agent can't be reached; empty if it can.
func (r *Reach) Lost() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.why
}
