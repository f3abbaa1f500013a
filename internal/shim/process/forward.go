package process

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
)

// listenerOf makes a listener of a file that another process has bound: a [net.Listener],
// or a [net.PacketConn]. The file may be closed then.
func listenerOf(file *os.File) (io.Closer, error) {
	kind, err := unix.GetsockoptInt(int(file.Fd()), unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return nil, os.NewSyscallError("getsockopt", err)
	}
	if kind == unix.SOCK_DGRAM {
		return net.FilePacketConn(file)
	}
	return net.FileListener(file)
}

// forward forwards what comes to a listener to a port of the guest, until what is returned
// is closed.
func (s *process) forward(listener io.Closer, guestPort int) io.Closer {
	switch l := listener.(type) {
	case net.Listener:
		return s.network.Forward(l, guestPort)
	case *net.UDPConn:
		return s.network.ForwardPackets(l, guestPort)
	}
	return listener // there are no others
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

func (s *process) addForward(ctx context.Context, forward shim.Forward) (shim.Forward, error) {
	if s.network == nil {
		return forward, fmt.Errorf("forward a port: %w: the VM has no network", smolvm.ErrUnsupported)
	}
	listener, err := forward.Listen(ctx)
	if err != nil {
		return forward, err
	}
	if port, ok := boundPort(listener); ok {
		forward.Host = netip.AddrPortFrom(forward.Host.Addr(), port)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forwards[forward] = s.forward(listener, forward.GuestPort)
	return forward, nil
}

func (s *process) removeForward(removed shim.Forward) error {
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
