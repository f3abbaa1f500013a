// Package agent is the host's side of the guest channel: the handshake with the agent,
// shutting the guest down, running commands in it and copying files. What runs in the guest is
// package guest; what both must agree on is package wire.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/compat"
)

// Link is an open guest channel, over which any number of connections run. All of its
// methods return when their context is done, whatever the guest does.
type Link struct {
	session *yamux.Session
	guard   *wire.Guard
	end     *sessionEnd
}

// Channel is the host's end of a guest channel: a connected socket.
type Channel interface {
	io.ReadWriteCloser
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
}

// Handshake opens the channel: it tells the guest who it is to be, and returns when the
// guest has become that and is ready. It owns channel, and closes it on failure.
func Handshake(ctx context.Context, channel Channel, hello wire.Hello) (*Link, wire.Answer, error) {
	// Closing is what ends a blocked read or write.
	stop := context.AfterFunc(ctx, func() { _ = channel.Close() })
	var answer wire.Answer
	hello.Protocol = hello.Needs()
	err := wire.Write(channel, hello)
	if err == nil {
		answer, err = readAnswer(channel, false)
	}
	if !stop() {
		return nil, answer, fmt.Errorf("handshake with the guest's agent: %w", context.Cause(ctx))
	}
	if err == nil && answer.Error != "" {
		err = errors.New(answer.Error)
	}
	if err == nil {
		err = compat.Check("what the guest's agent says", answer.Protocol, wire.Protocol)
	}
	if err != nil {
		_ = channel.Close()
		return nil, answer, fmt.Errorf("handshake with the guest's agent: %w", err)
	}
	end := &sessionEnd{channel: channel, stall: stallTime}
	guard := &wire.Guard{ReadWriteCloser: end}
	session, err := yamux.Client(&wire.WholeFrames{ReadWriteCloser: guard}, wire.HostMuxConfig())
	if err != nil {
		_ = channel.Close()
		return nil, answer, fmt.Errorf("open guest channel: %w", err)
	}
	return &Link{session: session, guard: guard, end: end}, answer, nil
}

// maxAnswers bounds how many answers are passed over: of the sessions that a guest was
// saved in the middle of, each leaves at most one.
const maxAnswers = 16

// readAnswer reads answers up to the next one that is the end of a session, or that is not.
func readAnswer(channel io.Reader, again bool) (wire.Answer, error) {
	for range maxAnswers {
		answer, err := wire.ReadAnswer(channel)
		if err != nil || answer.Again == again {
			return answer, err
		}
	}
	return wire.Answer{}, fmt.Errorf("%w: it answers without end", wire.ErrProtocol)
}

// Reset ends the session in the middle of which a guest was saved, and makes the guest ready
// for a handshake.
func Reset(ctx context.Context, channel Channel) error {
	stop := context.AfterFunc(ctx, func() { _ = channel.Close() })
	// The guest may have to get rid of something before it reads on.
	written := make(chan error, 1)
	go func() {
		_, err := channel.Write(wire.Break())
		written <- err
	}()
	_, err := readAnswer(channel, true)
	if err != nil {
		_ = channel.Close()
	}
	err = errors.Join(err, <-written)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("reset the guest channel: %w", err)
	}
	return nil
}

// Open opens one connection to the guest's agent.
func (l *Link) Open(ctx context.Context) (net.Conn, error) {
	stream, err := l.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to the guest's agent: %w", err)
	}
	return stream, nil
}

// open opens a stream. Where yamux goes on waiting, for a guest that does not read, the
// stream is closed as soon as it is open.
func (l *Link) open(ctx context.Context) (*muxStream, error) {
	type opened struct {
		stream *yamux.Stream
		err    error
	}
	result := make(chan opened, 1)
	go func() {
		stream, err := l.session.OpenStream()
		result <- opened{stream, err}
	}()
	select {
	case o := <-result:
		if o.err != nil {
			return nil, l.explain(o.err)
		}
		return &muxStream{o.stream}, nil
	case <-ctx.Done():
		go func() {
			if o := <-result; o.err == nil {
				_ = o.stream.Close()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

// explain adds to an error of a session why the session has ended.
func (l *Link) explain(err error) error {
	if cause := l.Fault(); cause != nil {
		return fmt.Errorf("%w (%w)", err, cause)
	}
	return err
}

// Fault returns what the guest has done, or not done, that ended the session; nil if it was
// not that.
func (l *Link) Fault() error { return errors.Join(l.guard.Err(), l.end.err()) }

// Shutdown asks the guest to shut down, giving its processes so long to end after a signal; zero
// is the usual one. It returns when the guest has agreed, before it is down.
func (l *Link) Shutdown(ctx context.Context, grace time.Duration, signal int) error {
	if err := l.control(ctx, wire.Control{Shutdown: &wire.Shutdown{Grace: grace, Signal: signal}}); err != nil {
		return fmt.Errorf("ask the guest's agent to shut down: %w", err)
	}
	return nil
}

// Sync returns when the guest's file systems have been written out.
func (l *Link) Sync(ctx context.Context) error {
	if err := l.control(ctx, wire.Control{Sync: true}); err != nil {
		return fmt.Errorf("have the guest's agent write out its file systems: %w", err)
	}
	return nil
}

// SetClock sets the guest's clock.
func (l *Link) SetClock(ctx context.Context, now time.Time) error {
	if err := l.control(ctx, wire.Control{Clock: &now}); err != nil {
		return fmt.Errorf("set the guest's clock: %w", err)
	}
	return nil
}

// Ping returns when the agent has answered.
func (l *Link) Ping(ctx context.Context) error {
	if err := l.control(ctx, wire.Control{Ping: true}); err != nil {
		return fmt.Errorf("ping the guest's agent: %w", err)
	}
	return nil
}

// Mount has the guest mount a directory of the host. The connection carries the messages of FUSE,
// and all in the directory is to be owner's.
func (l *Link) Mount(ctx context.Context, order wire.Mount) (_ net.Conn, owner wire.Owner, err error) {
	conn, err := l.open(ctx)
	if err == nil {
		err = bounded(ctx, func() error {
			answer, err := exchange(ctx, conn, wire.Control{Mount: &order})
			owner = answer.Owner
			return err
		})
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		if conn != nil {
			_ = conn.Close()
		}
		return nil, wire.Owner{}, fmt.Errorf("have the guest's agent mount %s: %w", order.Target, err)
	}
	return conn, owner, nil
}

// MountsReady returns when all that the guest has mounted of the host can be used.
func (l *Link) MountsReady(ctx context.Context) error {
	if err := l.control(ctx, wire.Control{MountsReady: true}); err != nil {
		return fmt.Errorf("use directories of the host in the guest: %w", err)
	}
	return nil
}

func (l *Link) control(ctx context.Context, request wire.Control) error {
	conn, err := l.open(ctx)
	if err != nil {
		return err
	}
	return bounded(ctx, func() error {
		defer func() { _ = conn.Close() }()
		_, err := exchange(ctx, conn, request)
		return err
	})
}

// bounded returns what do returns, or when ctx is done.
func bounded(ctx context.Context, do func() error) error {
	result := make(chan error, 1)
	go func() { result <- do() }()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// exchange sends a request and reads its answer. A write may take longer than ctx.
func exchange(ctx context.Context, conn net.Conn, request wire.Control) (wire.ControlAnswer, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := wire.Write(conn, request); err != nil {
		return wire.ControlAnswer{}, err
	}
	answer, err := wire.ReadControlAnswer(conn)
	if err == nil && answer.Error != "" {
		err = errors.New(answer.Error)
	}
	return answer, err
}

// SetHeld tells the link whether the guest's CPUs are held, for then it is not given up
// for taking nothing: its connections wait.
func (l *Link) SetHeld(held bool) { l.end.held.Store(held) }

// Release ends the session and all connections over it, but leaves the channel open. It
// returns when the guest waits for the next hello.
func (l *Link) Release(ctx context.Context) error {
	l.end.keep.Store(true)
	_ = l.session.Close()
	err := errors.Join(l.end.channel.SetReadDeadline(time.Time{}), l.end.channel.SetWriteDeadline(time.Time{}))
	if err != nil {
		return fmt.Errorf("release the guest channel: %w", err)
	}
	return Reset(ctx, l.end.channel)
}

// Done returns a channel of Go's that is closed when the guest channel has ended.
func (l *Link) Done() <-chan struct{} { return l.session.CloseChan() }

// Close ends the channel and all connections over it.
func (l *Link) Close() error { return l.session.Close() }
