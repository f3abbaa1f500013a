// Package agent is the host's side of the guest channel: greeting the agent,
// shutting the guest down, and, as an SSH client, running commands in it and
// copying files. What runs in the guest is package guest; what both must agree on
// is package wire.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Link is an open guest channel, over which any number of connections run.
type Link struct {
	session *yamux.Session
	end     *sessionEnd
}

// Channel is the host's end of a guest channel: a connected socket.
type Channel interface {
	io.ReadWriteCloser
	SetReadDeadline(t time.Time) error
}

// sessionEnd is the channel as a session has it, who may have to leave it open.
type sessionEnd struct {
	channel Channel
	keep    atomic.Bool
}

func (e *sessionEnd) Read(p []byte) (int, error)  { return e.channel.Read(p) }
func (e *sessionEnd) Write(p []byte) (int, error) { return e.channel.Write(p) }

// Close ends the reading, and unless the channel is kept all of it.
func (e *sessionEnd) Close() error {
	if e.keep.Load() {
		return e.channel.SetReadDeadline(time.Unix(1, 0))
	}
	return e.channel.Close()
}

// Greet opens the channel: it tells the guest who it is to be, and returns when the
// guest has become that and is ready. It owns channel, and closes it on failure.
func Greet(ctx context.Context, channel Channel, greeting wire.Greeting) (*Link, wire.Answer, error) {
	// Closing is what ends a blocked read or write.
	stop := context.AfterFunc(ctx, func() { _ = channel.Close() })
	var answer wire.Answer
	err := wire.Write(channel, greeting)
	if err == nil {
		answer, err = readAnswer(channel, false)
	}
	if !stop() {
		return nil, answer, fmt.Errorf("greet the guest's agent: %w", context.Cause(ctx))
	}
	if err == nil && answer.Error != "" {
		err = errors.New(answer.Error)
	}
	if err != nil {
		_ = channel.Close()
		return nil, answer, fmt.Errorf("greet the guest's agent: %w", err)
	}
	end := &sessionEnd{channel: channel}
	session, err := yamux.Client(&wire.WholeFrames{ReadWriteCloser: end}, wire.MuxConfig())
	if err != nil {
		_ = channel.Close()
		return nil, answer, fmt.Errorf("open guest channel: %w", err)
	}
	return &Link{session: session, end: end}, answer, nil
}

// readAnswer reads the next answer that says that a session is over, or that does not.
func readAnswer(channel io.Reader, again bool) (wire.Answer, error) {
	for {
		var answer wire.Answer
		if err := wire.Read(channel, &answer); err != nil || answer.Again == again {
			return answer, err
		}
	}
}

// Reset makes the guest ready to be greeted that was saved in the middle of a session.
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

// Open opens one connection to the guest's SSH server.
func (l *Link) Open() (net.Conn, error) {
	conn, err := l.session.Open()
	if err != nil {
		return nil, fmt.Errorf("connect to the guest's agent: %w", err)
	}
	return conn, nil
}

// Shutdown asks the guest to shut down, giving its processes so long to end. It
// returns when the guest has agreed, before it is down.
func (l *Link) Shutdown(ctx context.Context, grace time.Duration) error {
	if err := l.control(ctx, wire.Control{Shutdown: &wire.Shutdown{Grace: grace}}); err != nil {
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

func (l *Link) control(ctx context.Context, request wire.Control) error {
	conn, err := l.session.Open()
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	var answer wire.ControlAnswer
	err = wire.Write(conn, request)
	if err == nil {
		err = wire.Read(conn, &answer)
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case answer.Error != "":
		return errors.New(answer.Error)
	}
	return nil
}

// Release ends the session and all connections over it, but leaves the channel open. It
// returns when the guest waits for the next greeting.
func (l *Link) Release(ctx context.Context) error {
	l.end.keep.Store(true)
	_ = l.session.Close()
	if err := l.end.channel.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("release the guest channel: %w", err)
	}
	return Reset(ctx, l.end.channel)
}

// Done is closed when the channel has ended.
func (l *Link) Done() <-chan struct{} { return l.session.CloseChan() }

// Close ends the channel and all connections over it.
func (l *Link) Close() error { return l.session.Close() }
