package vmmfake

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm/internal/agent/plain"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/stream"
)

// version is the agent's.
const version = "vmmfake"

// guestChannel is the guest's end of the channel. Closing it ends only the session over it,
// as with the device that it stands for.
type guestChannel struct{ gated }

func (c guestChannel) Close() error { return c.SetReadDeadline(time.Unix(1, 0)) }

// serve is the agent: it answers one hello after the other, and serves the connections of
// each.
func (g *guest) serve(conn gated) {
	channel := guestChannel{conn}
	g.mu.Lock()
	stale := g.inSession
	g.mu.Unlock()
	if stale { // it was saved in the middle of a session, and believes in it
		_, _ = io.Copy(io.Discard, &wire.BreakReader{ReadWriteCloser: channel})
		g.sayAgain(channel)
	}
	for {
		if channel.SetReadDeadline(time.Time{}) != nil {
			return
		}
		var hello wire.Hello
		err := wire.Read(channel, &hello)
		if err != nil && g.machine.hosts != nil {
			return // it was reset, or the host has connected anew
		}
		if err == nil {
			err = g.answer(channel, hello)
		}
		if err != nil {
			g.say("agent: " + err.Error())
		}
		g.sayAgain(channel)
	}
}

func (g *guest) sayAgain(channel guestChannel) {
	g.setInSession(false)
	_ = wire.Write(channel, wire.Answer{Again: true})
}

func (g *guest) setInSession(in bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inSession = in
}

// answer takes on what a hello says, and serves the session that follows.
func (g *guest) answer(channel guestChannel, hello wire.Hello) error {
	answer := wire.Answer{
		Version: version, Kernel: "6.1.0-vmmfake",
		Timeline: []wire.Step{{Name: "agent started", At: time.Millisecond}, {Name: "hello received", At: g.uptime()}},
	}
	if hello.Time.IsZero() || len(hello.Seed) < 32 {
		answer.Error = "time or seed is missing"
	} else if identity, err := g.become(context.Background(), hello); err != nil {
		answer.Error = err.Error()
	} else {
		answer.Identity, answer.Authority = identity, len(hello.Authority) > 0
	}
	answer.Timeline = append(answer.Timeline, wire.Step{Name: "ready", At: g.uptime()})
	g.setInSession(answer.Error == "")
	if err := wire.Write(channel, answer); err != nil || answer.Error != "" {
		return err
	}
	if g.machine.has(Floods) {
		return flood(channel)
	}
	session, err := yamux.Server(&wire.WholeFrames{ReadWriteCloser: &wire.BreakReader{ReadWriteCloser: channel}}, wire.MuxConfig())
	if err != nil {
		return err
	}
	defer func() { _ = session.Close() }()
	for {
		stream, err := session.Accept()
		if err != nil {
			return nil // the session is over
		}
		go g.serveStream(stream)
	}
}

// flood asks for more answers than the channel holds, and takes none.
func flood(channel net.Conn) error {
	ping := make([]byte, 12) // version 0; see yamux's spec.md
	ping[1], ping[3] = 2, 1  // a ping, that is to be answered
	for range 20_000 {       // more than a socket's buffer holds
		if _, err := channel.Write(ping); err != nil {
			return err
		}
	}
	select {}
}

// servePlain serves the one channel of a connection without SSH.
func (g *guest) servePlain(conn stream.Peeked) {
	channel, err := plain.Accept(conn)
	if err != nil {
		return
	}
	g.mu.Lock()
	id := g.identity
	g.mu.Unlock()
	if id.hostKey == nil || channel.Identity() != ssh.FingerprintSHA256(id.hostKey) {
		refuse(channel, errors.New("it is not the guest that was meant"))
		return
	}
	g.serveChannel(channel, id.env)
}

// serveStream serves a channel, an SSH connection, or one control exchange.
func (g *guest) serveStream(opened net.Conn) {
	conn := stream.Peeked{Conn: opened, Reader: bufio.NewReader(opened)}
	first, err := conn.Reader.Peek(len(wire.Magic))
	switch {
	case err == nil && string(first) == wire.Magic:
	case g.machine.has(Echo):
		_, _ = io.Copy(opened, conn.Reader)
		_ = opened.Close()
		return
	default:
		if first, err := conn.Reader.Peek(plain.PeekSize); err == nil && plain.IsOpen(first) {
			g.servePlain(conn)
			return
		}
		g.serveSSH(conn, true)
		return
	}
	var control wire.Control
	if wire.Read(conn, &control) == nil {
		var answer wire.ControlAnswer
		if control.Sync {
			if err := g.sync(); err != nil {
				answer.Error = err.Error()
			}
		}
		if control.Clock != nil {
			g.setClock(*control.Clock)
		}
		_ = wire.Write(opened, answer)
	}
	_ = opened.Close()
	if control.Shutdown != nil && !g.machine.has(Deaf) {
		g.powerOff("")
	}
}

// identity is what the last hello made of the SSH server.
type identity struct {
	trusted, config *ssh.ServerConfig // config asks for a key
	hostKey         ssh.PublicKey
	env             []string
}

func newIdentity(hello wire.Hello) (identity, error) {
	if len(hello.HostKey) != ed25519.PrivateKeySize {
		return identity{}, fmt.Errorf("SSH host key has %d bytes", len(hello.HostKey))
	}
	signer, err := ssh.NewSignerFromKey(ed25519.PrivateKey(hello.HostKey))
	if err != nil {
		return identity{}, err
	}
	id := identity{
		hostKey: signer.PublicKey(),
		trusted: &ssh.ServerConfig{NoClientAuth: true},
		config: &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			for _, one := range hello.AuthorizedKeys {
				if string(one) == string(key.Marshal()) {
					return nil, nil
				}
			}
			return nil, fmt.Errorf("key is not authorized")
		}},
	}
	id.trusted.AddHostKey(signer)
	id.config.AddHostKey(signer)
	for _, name := range slices.Sorted(maps.Keys(hello.Env)) {
		id.env = append(id.env, name+"="+hello.Env[name])
	}
	return id, nil
}
