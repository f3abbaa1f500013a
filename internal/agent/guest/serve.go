package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/stream"
)

func durationOf(t unix.Timespec) time.Duration { return time.Duration(t.Nano()) }

// serve answers one hello after the other, and serves the connections of each
// until the host's end closes. fatal is what keeps the guest from being usable; it
// is all that the host is told then.
func (a *agent) serve(host endpoint, fatal error) error {
	a.server = newServer(a.reaper)
	a.server.proved, a.server.modules = a.rehearsal.wait, &a.demanded
	a.reaper.servesFiles, a.mounts.modules = a.mounts.any, &a.demanded
	for {
		channel, err := host.next()
		if err != nil {
			return err
		}
		var hello wire.Hello
		err = wire.Read(channel, &hello)
		if stream.IsBroken(err) || errors.Is(err, os.ErrClosed) || errors.Is(err, net.ErrClosed) {
			channel.lost() // the host went away again, or has connected anew
			continue
		}
		if err == nil {
			a.step("hello received")
			err = wire.Write(channel, a.answer(hello, fatal))
		}
		if err == nil && fatal == nil {
			err = a.serveSession(channel)
		}
		if err != nil {
			a.say(err.Error())
		}
		if err := channel.sayAgain(); err != nil {
			a.say(err.Error())
		}
	}
}

// answer takes on what a hello says.
func (a *agent) answer(hello wire.Hello, fatal error) wire.Answer {
	answer := wire.Answer{Protocol: wire.Protocol, Version: a.version, Kernel: kernelRelease()}
	if fatal == nil && hello.Protocol > wire.HelloProtocol {
		fatal = fmt.Errorf("the guest's agent is of an older smolvm: it knows protocols up to %d, and the host speaks %d; boot the VM with an image of the newer one", wire.HelloProtocol, hello.Protocol)
	}
	if fatal == nil {
		answer.Identity, answer.Warnings, fatal = a.takeOn(hello)
		a.first = false
		answer.Authority = len(hello.Authority) > 0
	}
	a.step("ready")
	answer.Timeline, a.timeline = a.timeline, nil
	if fatal != nil {
		answer.Error = fatal.Error()
		a.say(answer.Error)
	}
	return answer
}

// serveSession serves the streams of one yamux session.
func (a *agent) serveSession(channel channel) error {
	session, err := yamux.Server(&wire.WholeFrames{ReadWriteCloser: &wire.BreakReader{ReadWriteCloser: channel}}, wire.MuxConfig())
	if err != nil {
		return err
	}
	defer func() { _ = session.Close() }()
	for {
		opened, err := session.Accept()
		if err != nil {
			return nil // the session is over
		}
		go a.serveStream(muxStream{opened.(*yamux.Stream)}) //nolint:forcetypeassert // as documented
	}
}

func peek(conn net.Conn) stream.Peeked {
	return stream.Peeked{Conn: conn, Reader: bufio.NewReader(conn)}
}

// muxStream is a stream of a session as a connection. Of yamux's own, Close only ends the
// writing, and leaves what waits to be written.
type muxStream struct{ *yamux.Stream }

// CloseWrite implements [plain.Conn].
func (s muxStream) CloseWrite() error { return s.Stream.Close() }

// Close implements [net.Conn]. What was written is sent.
func (s muxStream) Close() error {
	return errors.Join(s.SetDeadline(longAgo), s.Stream.Close())
}

// serveStream serves a channel, an SSH connection, or one control exchange.
func (a *agent) serveStream(opened net.Conn) {
	conn := peek(opened)
	first, err := conn.Reader.Peek(len(wire.Magic))
	if err == nil && string(first) != wire.Magic {
		a.server.ServeTrusted(conn)
		return
	}
	defer func() { _ = opened.Close() }()
	var control wire.Control
	if wire.Read(conn, &control) != nil {
		return
	}
	if control.Mount != nil {
		a.mounts.serve(*control.Mount, conn)
		return
	}
	_ = wire.Write(opened, a.obey(control))
	if control.Shutdown != nil {
		_ = opened.Close()
		a.shutdown(*control.Shutdown)
	}
}

// obey does what a control asks for, but for a shutdown, which comes after the answer.
func (a *agent) obey(control wire.Control) wire.ControlAnswer {
	var err error
	switch {
	case control.MountsReady:
		err = a.mounts.ready()
	case control.Sync:
		unix.Sync()
	case control.Clock != nil:
		err = setClock(*control.Clock)
	}
	if err != nil {
		return wire.ControlAnswer{Error: err.Error()}
	}
	return wire.ControlAnswer{}
}

func kernelRelease() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

// listenTCP serves SSH on the guest's network as well. Another server that has the
// port already is one that the image wants.
func (a *agent) listenTCP() error {
	if a.listening {
		return nil
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false) // nobody could use it, and it costs a restored guest time
	listener, err := config.Listen(context.Background(), "tcp", ":"+strconv.Itoa(wire.SSHPort))
	if err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			return nil
		}
		return err
	}
	a.listening = true
	go a.server.Listen(listener)
	return nil
}

func trimLine(b []byte) string { return strings.TrimSpace(string(b)) }
