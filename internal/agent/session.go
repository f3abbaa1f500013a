package agent

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// A guest that runs takes what it is sent at once: its agent reads all the time, and
// keeps what nobody wants yet. One that takes nothing for stallChecks times stallTime is
// given up. They are counted, instead of measured as one, so that the time does not count
// in which this process was frozen together with the guest.
const (
	stallTime   = 5 * time.Second
	stallChecks = 12
)

// errStalled ends a session.
var errStalled = errors.New("the guest's agent has taken nothing for a minute")

// past is a deadline that ends what waits.
var past = time.Unix(1, 0)

// sessionEnd is the channel as a session has it, who may have to leave it open.
type sessionEnd struct {
	channel Channel
	stall   time.Duration // stallTime; tests have less of it
	keep    atomic.Bool
	closed  atomic.Bool
	held    atomic.Bool
	stalled atomic.Bool
}

// Read implements [io.Reader].
func (e *sessionEnd) Read(p []byte) (int, error) { return e.channel.Read(p) }

// Write implements [io.Writer]. It fails when the guest takes nothing although it runs.
func (e *sessionEnd) Write(p []byte) (int, error) {
	checks := stallChecks
	for done := 0; ; {
		_ = e.channel.SetWriteDeadline(time.Now().Add(e.stall))
		if e.closed.Load() { // its deadline may have been overwritten
			return done, net.ErrClosed
		}
		n, err := e.channel.Write(p[done:])
		done += n
		switch {
		case err == nil || !errors.Is(err, os.ErrDeadlineExceeded) || e.closed.Load():
			return done, err
		case n > 0 || e.held.Load():
			checks = stallChecks
		default:
			checks--
		}
		if checks == 0 {
			e.stalled.Store(true)
			return done, errStalled
		}
	}
}

// Close ends reads and writes, and unless the channel is kept all of it.
func (e *sessionEnd) Close() error {
	e.closed.Store(true)
	if e.keep.Load() {
		return errors.Join(e.channel.SetReadDeadline(past), e.channel.SetWriteDeadline(past))
	}
	return e.channel.Close()
}

// err returns why the session was given up; nil if it was not.
func (e *sessionEnd) err() error {
	if e.stalled.Load() {
		return errStalled
	}
	return nil
}

// muxStream is a stream of a session as a connection. Of yamux's own, Close only ends the
// writing, and waits for a guest that does not read.
type muxStream struct{ *yamux.Stream }

// CloseWrite ends the writing.
func (s *muxStream) CloseWrite() error { return s.Stream.Close() }

// Close implements [net.Conn]. What was written is sent.
func (s *muxStream) Close() error {
	err := s.SetDeadline(past)
	go func() { _ = s.Stream.Close() }()
	return err
}
