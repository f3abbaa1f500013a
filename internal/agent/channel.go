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
	"time"

	"github.com/hashicorp/yamux"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Link is an open guest channel, over which any number of connections run.
type Link struct{ session *yamux.Session }

// Greet opens the channel: it tells the guest who it is to be, and returns when the
// guest has become that and is ready. It owns channel, and closes it on failure.
func Greet(ctx context.Context, channel io.ReadWriteCloser, greeting wire.Greeting) (*Link, wire.Answer, error) {
	// Closing is what ends a blocked read or write.
	stop := context.AfterFunc(ctx, func() { _ = channel.Close() })
	var answer wire.Answer
	err := wire.Write(channel, greeting)
	if err == nil {
		err = wire.Read(channel, &answer)
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
	session, err := yamux.Client(channel, wire.MuxConfig())
	if err != nil {
		_ = channel.Close()
		return nil, answer, fmt.Errorf("open guest channel: %w", err)
	}
	return &Link{session: session}, answer, nil
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

// Done is closed when the channel has ended.
func (l *Link) Done() <-chan struct{} { return l.session.CloseChan() }

// Close ends the channel and all connections over it.
func (l *Link) Close() error { return l.session.Close() }
