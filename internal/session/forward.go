package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
)

// forward forwards what comes to a listener to a port of the guest, until what is returned
// is closed.
func (s *Session) forward(listener io.Closer, guestPort int) io.Closer {
	switch l := listener.(type) {
	case net.Listener:
		if s.opts.Accepted != nil {
			l = noting{l, func(from net.Addr) { s.opts.Accepted(from, guestPort) }}
		}
		return s.network.Forward(l, guestPort)
	case *net.UDPConn:
		return s.network.ForwardPackets(l, guestPort)
	}
	return listener // there are no others
}

// noting is a listener that tells of its connections, and hands them out as they are: the kernel
// may move their bytes.
type noting struct {
	net.Listener
	accepted func(from net.Addr)
}

// Accept implements [net.Listener].
func (n noting) Accept() (net.Conn, error) {
	conn, err := n.Listener.Accept()
	if err == nil {
		n.accepted(conn.RemoteAddr())
	}
	return conn, err
}

// boundPort is the port that a listener is bound to.
func boundPort(listener io.Closer) (uint16, bool) {
	switch l := listener.(type) {
	case net.Listener:
		addr, ok := l.Addr().(*net.TCPAddr)
		return addr.AddrPort().Port(), ok
	case net.PacketConn:
		addr, ok := l.LocalAddr().(*net.UDPAddr)
		return addr.AddrPort().Port(), ok
	}
	return 0, false
}

// Forwards are a session's port forwards.
type Forwards struct{ s *Session }

// Forwards returns the port forwards.
func (s *Session) Forwards() Forwards { return Forwards{s} }

// Add binds the host port of a forward, and forwards it. It returns the forward with the port
// that was bound.
func (f Forwards) Add(ctx context.Context, forward shim.Forward) (shim.Forward, error) {
	if f.s.network == nil {
		return forward, fmt.Errorf("forward a port: %w: the VM has no network", smolvm.ErrUnsupported)
	}
	listener, err := forward.Listen(ctx)
	if err != nil {
		return forward, err
	}
	if port, ok := boundPort(listener); ok {
		forward.Host = netip.AddrPortFrom(forward.Host.Addr(), port)
	}
	return forward, f.Serve(forward, listener)
}

// Serve forwards what comes to a listener on the host port of a forward. The listener is the
// session's from then on.
func (f Forwards) Serve(forward shim.Forward, listener io.Closer) error {
	s := f.s
	if s.network == nil {
		return errors.Join(errors.New("a VM without a network can't have port forwards"), listener.Close())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forwards[forward] = s.forward(listener, forward.GuestPort)
	return nil
}

// allForwards returns the forwards, by their host ports.
func (s *Session) allForwards() []shim.Forward {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Keys(s.forwards), func(a, b shim.Forward) int {
		return cmp.Or(a.Host.Compare(b.Host), cmp.Compare(a.Protocol, b.Protocol))
	})
}

// Remove ends a forward, with its connections. The error matches [smolvm.ErrNotFound].
func (f Forwards) Remove(removed shim.Forward) error {
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for forward, closer := range s.forwards {
		if forward.Host == removed.Host && isUDP(forward) == isUDP(removed) {
			delete(s.forwards, forward)
			return closer.Close()
		}
	}
	return fmt.Errorf("forward of %s: %w", removed.Host, smolvm.ErrNotFound)
}

func isUDP(f shim.Forward) bool { return f.Protocol == smolvm.UDP }
