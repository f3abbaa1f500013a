package tapnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/outbound"
	"github.com/smolvm/smolvm/internal/stream"
)

const (
	// maxConns bounds the guest's connections over TCP that are carried, each of which costs
	// this process two sockets. What are more are broken off.
	maxConns = 512
	// guestBuffer is what the kernel holds of a connection in each direction, in bytes, twice of
	// which it counts. The link has no latency to speak of, so more would only be more memory for
	// a guest to fill.
	guestBuffer = 256 << 10
	// portTries is how often a port is looked for that is free for all protocols.
	portTries = 16
)

// carrier takes a guest's flows by sockets of this process at the gateway's address, which the
// rules of nftables give them to wherever they are to (see [carryChains]), and hands them to the
// guest's way out.
type carrier struct {
	out       *outbound.Outbound
	tap       string
	port      uint16
	listeners []net.Listener
	packets   []*packetCarrier
	slots     chan struct{} // holds one for each connection
	ctx       context.Context
	cancel    context.CancelFunc
	running   sync.WaitGroup // what accepts, and the connections
}

// newCarrier opens the sockets of a guest, at one port. It takes flows from then on. The
// interface need not have its addresses yet.
func newCarrier(config network.Config, out *outbound.Outbound) (*carrier, error) {
	var err error
	for range portTries {
		var c *carrier
		if c, err = listenAll(config, out); err == nil {
			c.serve()
			return c, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return nil, fmt.Errorf("listen for the flows of the guest: %w", err)
}

func listenAll(config network.Config, out *outbound.Outbound) (_ *carrier, err error) {
	c := &carrier{out: out, tap: config.TAP, slots: make(chan struct{}, maxConns)}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	for _, gateway := range []netip.Addr{config.Gateway, config.Gateway6} {
		if !gateway.IsValid() {
			continue
		}
		suffix := "4"
		if gateway.Is6() {
			suffix = "6"
		}
		lc := net.ListenConfig{Control: transparent(c.tap)}
		listener, err := lc.Listen(c.ctx, "tcp"+suffix, netip.AddrPortFrom(gateway, c.port).String())
		if err != nil {
			return nil, err
		}
		c.listeners = append(c.listeners, listener)
		c.port = addrPort(listener.Addr()).Port()
		packets, err := newPacketCarrier(c, "udp"+suffix, netip.AddrPortFrom(gateway, c.port))
		if err != nil {
			return nil, err
		}
		c.packets = append(c.packets, packets)
	}
	return c, nil
}

// transparent makes a socket one on a guest's interface that may have any address, and that
// connections which are to any address may be given to.
func transparent(tap string) func(network, address string, raw syscall.RawConn) error {
	return func(network, _ string, raw syscall.RawConn) error {
		level, option := unix.SOL_IP, unix.IP_TRANSPARENT
		if network[len(network)-1] == '6' {
			level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
		}
		var err error
		controlErr := raw.Control(func(fd uintptr) {
			err = errors.Join(unix.BindToDevice(int(fd), tap), unix.SetsockoptInt(int(fd), level, option, 1))
		})
		return errors.Join(controlErr, err)
	}
}

func addrPort(addr net.Addr) netip.AddrPort {
	known, ok := addr.(interface{ AddrPort() netip.AddrPort })
	if !ok {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(known.AddrPort().Addr().Unmap(), known.AddrPort().Port())
}

func (c *carrier) serve() {
	for _, listener := range c.listeners {
		c.running.Go(func() {
			stream.Accept(c.ctx, listener, func(conn net.Conn) { c.accept(conn, addrPort(listener.Addr())) })
		})
	}
	for _, p := range c.packets {
		c.running.Go(p.serve)
	}
}

// accept hands a connection that the kernel has established with the guest to the way out.
func (c *carrier) accept(conn net.Conn, own netip.AddrPort) {
	tcp, ok := conn.(*net.TCPConn)
	to := addrPort(conn.LocalAddr())
	if !ok || to == own { // it was to no address outside
		_ = conn.Close()
		return
	}
	_, _ = tcp.SetReadBuffer(guestBuffer), tcp.SetWriteBuffer(guestBuffer)
	carried := carriedConn{tcp}
	select {
	case c.slots <- struct{}{}:
	default:
		carried.Abort()
		return
	}
	c.running.Go(func() {
		defer func() { <-c.slots }()
		c.out.Connect(to, carriedRequest{carried})
	})
}

// close lets no flow begin any more. Those that there are end with the way out.
func (c *carrier) close() {
	c.cancel()
	for _, listener := range c.listeners {
		_ = listener.Close()
	}
	for _, p := range c.packets {
		p.close()
	}
}

// wait returns when nothing of a closed carrier runs any more.
func (c *carrier) wait() { c.running.Wait() }

// carriedConn is a connection of the guest over TCP.
type carriedConn struct{ *net.TCPConn }

// Abort implements [outbound.GuestConn].
func (c carriedConn) Abort() {
	_ = c.SetLinger(0) // makes closing send a reset, see socket(7)
	_ = c.Close()
}

// Kernel implements [outbound.KernelConn].
func (c carriedConn) Kernel() *net.TCPConn { return c.TCPConn }

// carriedRequest is a connection that the guest believes to be established: the kernel has
// answered it, as it does before anybody is asked.
type carriedRequest struct{ conn carriedConn }

// Accept implements [outbound.Request].
func (r carriedRequest) Accept() (outbound.GuestConn, error) { return r.conn, nil }

// Refuse implements [outbound.Request].
func (r carriedRequest) Refuse() { r.conn.Abort() }
