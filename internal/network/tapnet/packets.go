package tapnet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network/outbound"
)

// maxEarly bounds the datagrams of a flow that have come before its own socket was there and
// that wait to be taken on.
const maxEarly = 16

// packetCarrier takes the datagrams of a guest over one version of IP that belong to no flow yet.
// Each flow has a socket of its own, which has the address that the guest sends to.
type packetCarrier struct {
	of      *carrier
	conn    *net.UDPConn
	network string // udp4 or udp6
	refuser *refuser

	mu    sync.Mutex // guards the following
	flows map[pair]*carriedPackets
}

// pair is from where and to where a guest's flow of datagrams is.
type pair struct{ from, to netip.AddrPort }

func newPacketCarrier(c *carrier, protocol string, at netip.AddrPort) (*packetCarrier, error) {
	config := net.ListenConfig{Control: func(network, address string, raw syscall.RawConn) error {
		var err error
		controlErr := raw.Control(func(fd uintptr) {
			if at.Addr().Is4() {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1)
			}
		})
		return errors.Join(controlErr, err, transparent(c.tap)(network, address, raw))
	}}
	conn, err := config.ListenPacket(c.ctx, protocol, at.String())
	if err != nil {
		return nil, err
	}
	return &packetCarrier{
		of: c, conn: conn.(*net.UDPConn), network: protocol, refuser: newRefuser(c.tap, at.Addr()), flows: map[pair]*carriedPackets{},
	}, nil
}

// serve begins flows until the socket is closed.
func (p *packetCarrier) serve() {
	datagram := make([]byte, outbound.MaxDatagram)
	control := make([]byte, unix.CmsgSpace(unix.SizeofSockaddrInet6))
	for {
		size, controlSize, _, from, err := p.conn.ReadMsgUDPAddrPort(datagram, control)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		to, ok := originalDestination(control[:controlSize])
		if err != nil || !ok || to == addrPort(p.conn.LocalAddr()) {
			continue
		}
		p.take(pair{netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port()), to}, datagram[:size])
	}
}

// originalDestination returns where a datagram was sent to.
func originalDestination(control []byte) (netip.AddrPort, bool) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for i := range messages {
		switch to, err := unix.ParseOrigDstAddr(&messages[i]); to := to.(type) {
		case *unix.SockaddrInet4:
			return netip.AddrPortFrom(netip.AddrFrom4(to.Addr), uint16(to.Port)), err == nil
		case *unix.SockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16(to.Addr), uint16(to.Port)), err == nil
		}
	}
	return netip.AddrPort{}, false
}

// take begins a flow with its first datagram, or adds one that came before the flow's own socket
// was there.
func (p *packetCarrier) take(flow pair, datagram []byte) {
	p.mu.Lock()
	known := p.flows[flow]
	p.mu.Unlock()
	if known != nil {
		known.add(datagram)
		return
	}
	var failed error
	taken := p.of.out.Send(flow.to, datagram, func() (conn net.Conn, err error) {
		conn, err = p.open(flow, datagram)
		failed = err
		return conn, err
	})
	if !taken || failed != nil {
		p.refuser.refuse(flow, datagram)
	}
}

// open opens the socket of a flow. It fails if a program of the host listens at the same port of
// all addresses, and does not share it (SO_REUSEADDR).
func (p *packetCarrier) open(flow pair, first []byte) (net.Conn, error) {
	dialer := net.Dialer{
		LocalAddr: net.UDPAddrFromAddrPort(flow.to),
		Control: func(network, address string, raw syscall.RawConn) error {
			var err error
			controlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
			return errors.Join(controlErr, err, transparent(p.of.tap)(network, address, raw))
		},
	}
	conn, err := dialer.DialContext(context.Background(), p.network, flow.from.String())
	if err != nil {
		return nil, err
	}
	c := &carriedPackets{Conn: conn, of: p, flow: flow}
	c.add(first)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flows[flow] = c
	return c, nil
}

func (p *packetCarrier) close() {
	_ = p.conn.Close()
	p.refuser.close()
}

// carriedPackets is a flow of datagrams of the guest.
type carriedPackets struct {
	net.Conn
	of   *packetCarrier
	flow pair

	mu       sync.Mutex // guards the following
	early    [][]byte
	deadline time.Time
}

// add adds a datagram that came to another socket. Who reads is woken up.
func (c *carriedPackets) add(datagram []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.early) < maxEarly {
		c.early = append(c.early, append([]byte(nil), datagram...))
		_ = c.Conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// Read implements [net.Conn].
func (c *carriedPackets) Read(p []byte) (int, error) {
	for {
		if n, ok := c.next(p); ok {
			return n, nil
		}
		n, err := c.Conn.Read(p)
		if !errors.Is(err, os.ErrDeadlineExceeded) || !c.isWoken() {
			return n, err
		}
	}
}

// next returns one of the datagrams that were added.
func (c *carriedPackets) next(p []byte) (int, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.early) == 0 {
		return 0, false
	}
	n := copy(p, c.early[0])
	if c.early = c.early[1:]; len(c.early) == 0 {
		_ = c.Conn.SetReadDeadline(c.deadline)
	}
	return n, true
}

// isWoken reports whether a read has ended because a datagram was added, and not by the reader's
// deadline.
func (c *carriedPackets) isWoken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.early) > 0
}

// SetReadDeadline implements [net.Conn].
func (c *carriedPackets) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	if len(c.early) > 0 {
		return nil
	}
	return c.Conn.SetReadDeadline(t)
}

// Close implements [net.Conn].
func (c *carriedPackets) Close() error {
	c.of.mu.Lock()
	if c.of.flows[c.flow] == c {
		delete(c.of.flows, c.flow)
	}
	c.of.mu.Unlock()
	return c.Conn.Close()
}
