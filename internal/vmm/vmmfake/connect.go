package vmmfake

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/smolvm/smolvm/internal/vmm"
)

// listen makes a listener for the VMM, whose guest is connected to, and returns its address.
func listen() (address string, theirs *os.File, err error) {
	address = "@smolvm-vmmfake-" + rand.Text() // of no file, so nothing is left
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		return "", nil, fmt.Errorf("listen for the guest channel: %w", err)
	}
	theirs, err = listener.File() // duplicates it
	return address, theirs, errors.Join(err, listener.Close())
}

// ResetsChannel implements [vmm.ChannelResetter].
func (i *instance) ResetsChannel() bool { return i.resets }

// connect opens the channel; the instance is locked.
func (i *instance) connect(ctx context.Context) (vmm.Channel, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", i.address)
	if err != nil {
		return nil, fmt.Errorf("open the guest channel: %w", err)
	}
	i.channelTaken = true
	return &connectedChannel{Conn: conn, instance: i}, nil
}

// connectedChannel is an open channel, after which another may be opened.
type connectedChannel struct {
	net.Conn
	instance *instance
	once     sync.Once
}

// Close implements [vmm.Channel].
func (c *connectedChannel) Close() error {
	c.once.Do(func() {
		c.instance.mu.Lock()
		defer c.instance.mu.Unlock()
		c.instance.channelTaken = false
	})
	return c.Conn.Close()
}

// hosts are the connections to a guest, of which it serves the newest.
type hosts struct {
	net.Listener

	mu      sync.Mutex // guards the following
	current *hostConn
	deaf    bool // no connection is accepted any more
}

func newHosts(listener *os.File) (*hosts, error) {
	defer func() { _ = listener.Close() }()
	l, err := net.FileListener(listener)
	if err != nil {
		return nil, err
	}
	return &hosts{Listener: l}, nil
}

// reset resets the connection, and with deaf has those that follow wait for ever.
func (h *hosts) reset(deaf bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deaf = h.deaf || deaf
	if h.current != nil {
		h.current.reset()
	}
}

// put makes a connection the current one, and returns the one before; nil: there was none. It
// reports whether it is to be served.
func (h *hosts) put(conn *hostConn) (last *hostConn, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	last, h.current = h.current, conn
	return last, !h.deaf
}

// accept has the agent serve one connection after the other.
func (g *guest) accept(h *hosts) {
	resetFirst := g.restored && g.machine.has(ResetsFirst)
	served := make(chan struct{})
	close(served)
	for {
		conn, err := h.Accept()
		if err != nil {
			return
		}
		g.machine.cpu.step()
		host := newHostConn(conn)
		last, ok := h.put(host)
		if last != nil {
			last.reset()
			_ = last.Close()
		}
		<-served
		if !ok {
			continue
		}
		served = make(chan struct{})
		if resetFirst {
			resetFirst = false
			_, _ = host.Read(make([]byte, 1))
			_ = conn.Close()
			close(served)
			continue
		}
		go func(served chan struct{}) {
			defer close(served)
			if g.script {
				g.obey(gated{host, &g.machine.cpu})
			} else {
				g.serve(gated{host, &g.machine.cpu})
			}
		}(served)
	}
}

// hostConn is a connection of the host's. Once it is reset, the guest's reads and writes fail,
// and the host's end is closed when it has written something.
type hostConn struct {
	net.Conn
	in, pump net.Conn // a pipe, which the guest reads what comes from
	dead     atomic.Bool
}

func newHostConn(conn net.Conn) *hostConn {
	c := &hostConn{Conn: conn}
	c.in, c.pump = net.Pipe()
	go c.receive()
	return c
}

func (c *hostConn) receive() {
	buf := make([]byte, 32<<10)
	for {
		n, err := c.Conn.Read(buf)
		if err == nil && !c.dead.Load() {
			_, _ = c.pump.Write(buf[:n]) // fails when it is reset
			continue
		}
		_ = c.pump.Close()
		if c.dead.Load() {
			_ = c.Close()
		}
		return
	}
}

func (c *hostConn) reset() {
	c.dead.Store(true)
	_ = c.pump.Close()
}

// Read implements [net.Conn].
func (c *hostConn) Read(p []byte) (int, error) { return c.in.Read(p) }

// Write implements [net.Conn].
func (c *hostConn) Write(p []byte) (int, error) {
	if c.dead.Load() {
		return 0, syscall.ECONNRESET
	}
	return c.Conn.Write(p)
}

// SetReadDeadline implements [net.Conn].
func (c *hostConn) SetReadDeadline(t time.Time) error { return c.in.SetReadDeadline(t) }
