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
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// maxConns bounds the guest's TCP connections to the outside, each of which costs
	// this process two sockets and up to four times [tcpBuffer].
	maxConns = 512
	// maxDials bounds those that are being set up.
	maxDials = 64
	// dialTimeout is about what Linux allows a connection by default, less what the
	// guest has waited already.
	dialTimeout = 2 * time.Minute
)

var errRefused = errors.New("the guest may not connect to this address")

// outbound is the guest's way out: what it sends to the outside is sent from sockets
// of this process. So the host trusts it as if it came from the host; what listens
// on the host for the host alone must be out of its reach.
type outbound struct {
	inside netip.Prefix // the VM's own network, which holds nobody else
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex // guards the following
	closed  bool
	conns   int                // over TCP
	flows   map[*flow]struct{} // over UDP
	running sync.WaitGroup     // counts both
}

// newOutbound makes the way out for what the stack itself does not serve.
func newOutbound(s *stack.Stack, inside netip.Prefix) *outbound {
	o := &outbound{inside: inside, flows: map[*flow]struct{}{}}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(s, tcpBuffer, maxDials, o.connect).HandlePacket)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(s, o.send).HandlePacket)
	return o
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
	if !o.beginConn() {
		request.Complete(true)
		return
	}
	defer o.endConn()
	outside, err := o.dial(destination(request.ID()), "tcp4")
	if err != nil {
		request.Complete(true)
		return
	}
	var queue waiter.Queue
	endpoint, failed := request.CreateEndpoint(&queue)
	request.Complete(false)
	if failed != nil {
		_ = outside.Close()
		return
	}
	Splice(o.ctx, gonet.NewTCPConn(&queue, endpoint), outside)
}

func (o *outbound) beginConn() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || o.conns == maxConns {
		return false
	}
	o.conns++
	o.running.Add(1)
	return true
}

func (o *outbound) endConn() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.conns--
	o.running.Done()
}

func destination(id stack.TransportEndpointID) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(id.LocalAddress.As4()), id.LocalPort)
}

// dial connects to the outside, if that is where the address is: not to the VM's own
// network, nor to addresses that mean "this host", "this link" (where clouds have
// their metadata) or "everybody", nor to any address that the host has at the moment.
func (o *outbound) dial(to netip.AddrPort, network string) (net.Conn, error) {
	addr := to.Addr()
	// 0.0.0.0/8 is this host (RFC 6890), which Linux takes literally.
	if !addr.IsGlobalUnicast() || addr.As4()[0] == 0 || o.inside.Contains(addr) {
		return nil, fmt.Errorf("%s: %w", addr, errRefused)
	}
	// Connecting a UDP socket sends nothing, but makes the kernel choose a route and a
	// source address. For its own addresses, and no others, it chooses the very same.
	dialer := net.Dialer{Control: noBroadcast}
	probe, err := dialer.DialContext(o.ctx, "udp4", to.String())
	if err != nil {
		return nil, err
	}
	if isSame(probe.LocalAddr(), addr) {
		return nil, errors.Join(fmt.Errorf("%s is the host's: %w", addr, errRefused), probe.Close())
	}
	if network == "udp4" {
		return probe, nil
	}
	_ = probe.Close()
	dialer = net.Dialer{Timeout: dialTimeout}
	return dialer.DialContext(o.ctx, network, to.String())
}

func isSame(local net.Addr, addr netip.Addr) bool {
	udp, ok := local.(*net.UDPAddr)
	return ok && udp.AddrPort().Addr().Unmap() == addr
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
