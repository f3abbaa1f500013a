package usernet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/stream"
)

const (
	// maxDials bounds the guest's TCP connections that are being set up.
	maxDials = 64
	// dialTimeout is about what Linux allows a connection by default, less what the
	// guest has waited already.
	dialTimeout = 2 * time.Minute
)

// outbound is the guest's way out: what it sends to the outside is sent from sockets
// of this process. So the host trusts it as if it came from the host; what listens
// on the host for the host alone must be out of its reach.
type outbound struct {
	policy network.Policy
	inside netip.Prefix // the VM's own network, which holds nobody else
	routes hostRoutes
	conns  *kind // over TCP
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex // guards the following
	closed  bool
	flows   map[*flow]struct{} // over UDP
	running sync.WaitGroup     // counts connections being made, and flows
}

// newOutbound makes the way out for what the stack itself does not serve. An error says
// what it can't do; it can be used all the same.
func newOutbound(s *stack.Stack, config Config, conns *kind) (*outbound, error) {
	routes, err := newHostRoutes()
	o := &outbound{policy: policyOf(config), inside: config.Prefix, routes: routes, conns: conns, flows: map[*flow]struct{}{}}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(s, tcpBuffer, maxDials, o.connect).HandlePacket)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(s, o.send).HandlePacket)
	return o, err
}

// close lets nothing new begin, and ends what there is; wait waits for that.
func (o *outbound) close() {
	o.cancel()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	for f := range o.flows {
		f.close()
	}
}

func (o *outbound) wait() { o.running.Wait() }

// connect makes one TCP connection of the guest. The guest sees it established, or
// refused, when it is so outside. It runs in a goroutine of its own.
func (o *outbound) connect(request *tcp.ForwarderRequest) {
	if !o.begin() {
		request.Complete(true)
		return
	}
	defer o.running.Done()
	place, err := o.conns.reserve()
	if err != nil {
		request.Complete(true)
		return
	}
	outside, err := o.dial(destination(request.ID()), smolvm.TCP)
	if err != nil {
		place.release()
		request.Complete(true)
		return
	}
	var queue waiter.Queue
	endpoint, failed := request.CreateEndpoint(&queue)
	request.Complete(false)
	if failed != nil {
		place.release()
		_ = outside.Close()
		return
	}
	stream.Splice(o.ctx, place.conn(endpoint, &queue), outside)
}

// begin counts a connection, unless there are to be no more.
func (o *outbound) begin() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.closed {
		o.running.Add(1)
	}
	return !o.closed
}

func destination(id stack.TransportEndpointID) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(id.LocalAddress.As4()), id.LocalPort)
}

// check returns an error that matches [errRefused] if the guest may not have an address:
// by the policy, or because it is the host's at the moment and the policy does not name the
// host. From is as for [hostRoutes.check].
func (o *outbound) check(protocol smolvm.Protocol, from, to netip.AddrPort) error {
	f := network.Flow{Protocol: protocol, To: to}
	if err := o.judge(f); err != nil {
		return err // so the kernel need not be asked
	}
	own := o.routes.check(protocol, from, to)
	if own == nil && from.Addr() == to.Addr() {
		own = fmt.Errorf("%s: %w: the host connects to itself", to, errRefused)
	}
	if own == nil {
		return nil
	}
	if f.Host = true; o.judge(f) == nil {
		return nil
	}
	return own
}

// dial connects to the outside, if that is where the address is, and if the guest may.
func (o *outbound) dial(to netip.AddrPort, protocol smolvm.Protocol) (net.Conn, error) {
	if err := o.check(protocol, netip.AddrPort{}, to); err != nil {
		return nil, err
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	if protocol == smolvm.UDP {
		dialer.Control = noBroadcast
	}
	conn, err := dialer.DialContext(o.ctx, string(protocol)+"4", to.String())
	if err != nil {
		return nil, err
	}
	// Meanwhile the host may have been given the address, and only now is it known which
	// port and address of the host itself the kernel has chosen.
	from, remote := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
	if remote != to {
		err = fmt.Errorf("%s: %w: it is connected to %s", to, errRefused, remote)
	} else {
		err = o.check(protocol, from, to)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

func addrPort(addr net.Addr) netip.AddrPort {
	known, ok := addr.(interface{ AddrPort() netip.AddrPort })
	if !ok {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(known.AddrPort().Addr().Unmap(), known.AddrPort().Port())
}

// noBroadcast takes back what Go allows every UDP socket: to send to all hosts of a
// network, which the host, with what listens on it, is one of.
func noBroadcast(_, _ string, conn syscall.RawConn) error {
	var err error
	controlErr := conn.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
	})
	return errors.Join(controlErr, err)
}
