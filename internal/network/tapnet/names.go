package tapnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/resolver"
)

const (
	dnsPort = 53
	// maxNameConns bounds the guest's connections over TCP to the name server.
	maxNameConns = 16
)

// newResolver makes what answers the guest's questions for names.
func (n *Network) newResolver(files resolver.Files) *resolver.Resolver {
	out := n.out.Load()
	return resolver.New(resolver.Config{
		Files: files, MayKnow: out.MayKnow, IPv6: n.config.Guest6.IsValid(),
		Policy: out.Policy, Told: out.Names().Record, Recorder: out.Recorder(),
	})
}

// SetRecorder implements [network.Recorded]: of the guest's questions for names, and of the flows
// that the shim carries. The packets of others are carried by the kernel.
func (n *Network) SetRecorder(r network.Recorder) { n.records.SetRecorder(r) }

// serveNames answers questions at the gateway's address, on the guest's interface alone: so
// each VM has its own server at the same address. The interface need not have the address yet.
func (n *Network) serveNames() error {
	at := net.JoinHostPort(n.config.Gateway.String(), strconv.Itoa(dnsPort))
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		controlErr := raw.Control(func(fd uintptr) {
			err = errors.Join(unix.BindToDevice(int(fd), n.config.TAP), unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1))
		})
		return errors.Join(controlErr, err)
	}}
	packets, err := config.ListenPacket(context.Background(), "udp4", at)
	if err != nil {
		return noNames(err)
	}
	listener, err := config.Listen(context.Background(), "tcp4", at)
	if err != nil {
		_ = packets.Close()
		return noNames(err)
	}
	n.servers = []*dns.Server{
		{PacketConn: packets, Handler: n.names},
		{Listener: &boundedListener{Listener: listener, open: map[*boundedConn]struct{}{}}, Handler: n.names},
	}
	for _, server := range n.servers {
		n.running.Go(func() { _ = server.ActivateAndServe() })
	}
	return nil
}

func noNames(err error) error {
	if errors.Is(err, unix.EADDRINUSE) {
		err = fmt.Errorf("a name server of the host listens on all of its addresses: %w", err)
	}
	return fmt.Errorf("the guest has no name server: %w", err)
}

// endNames ends what serveNames has begun, and returns when nothing of it runs any more.
func (n *Network) endNames() {
	for _, server := range n.servers {
		// Shutdown would wait for the guest; a server whose socket is closed ends.
		if server.PacketConn != nil {
			_ = server.PacketConn.Close()
		}
		if server.Listener != nil {
			_ = server.Listener.Close()
		}
	}
	if n.names != nil {
		_ = n.names.Close()
	}
	n.running.Wait()
}

// boundedListener breaks off the connections that are more than it may have. Closing it closes
// those that it has accepted.
type boundedListener struct {
	net.Listener
	mu     sync.Mutex // guards the following
	closed bool
	open   map[*boundedConn]struct{}
}

// Accept implements [net.Listener].
func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		bounded := &boundedConn{Conn: conn, of: l}
		if l.admit(bounded) {
			return bounded, nil
		}
		_ = conn.Close()
	}
}

func (l *boundedListener) admit(c *boundedConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.open) >= maxNameConns {
		return false
	}
	l.open[c] = struct{}{}
	return true
}

// Close implements [net.Listener].
func (l *boundedListener) Close() error {
	l.mu.Lock()
	l.closed = true
	open := slices.Collect(maps.Keys(l.open))
	l.mu.Unlock()
	for _, c := range open {
		_ = c.Close()
	}
	return l.Listener.Close()
}

type boundedConn struct {
	net.Conn
	of *boundedListener
}

// Close implements [net.Conn].
func (c *boundedConn) Close() error {
	c.of.mu.Lock()
	delete(c.of.open, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}
