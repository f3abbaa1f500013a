package usernet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/sniff"
	"github.com/smolvm/smolvm/internal/stream"
)

const (
	// maxDials bounds the guest's TCP connections that are being set up.
	maxDials = 64
	// httpsPort is also that of HTTP over QUIC.
	httpsPort = 443
	// dialTimeout is about what Linux allows a connection by default, less what the
	// guest has waited already.
	dialTimeout = 2 * time.Minute
)

// outbound is the guest's way out: what it sends to the outside is sent from sockets
// of this process. So the host trusts it as if it came from the host; what listens
// on the host for the host alone must be out of its reach.
type outbound struct {
	policy atomic.Pointer[network.Policy]
	asked  *askedNames
	inside netip.Prefix // the VM's own network, which holds nobody else
	routes hostRoutes
	conns  *kind // over TCP
	ctx    context.Context
	cancel context.CancelFunc

	mu       sync.Mutex // guards the following
	closed   bool
	revision int64 // of the policy
	tcp      map[*tcpFlow]struct{}
	flows    map[*flow]struct{} // over UDP
	running  sync.WaitGroup     // counts connections being made, and flows
}

// newOutbound makes the way out for what the stack itself does not serve. An error says
// what it can't do; it can be used all the same.
func newOutbound(s *stack.Stack, config Config, conns *kind) (*outbound, error) {
	routes, err := newHostRoutes()
	o := &outbound{
		asked: newAskedNames(), inside: config.Prefix, routes: routes, conns: conns,
		tcp: map[*tcpFlow]struct{}{}, flows: map[*flow]struct{}{},
	}
	var egress network.Egress
	if config.Egress != nil {
		egress = *config.Egress
	}
	o.revision = egress.Revision
	o.policy.Store(policyOf(config, egress.Policy))
	o.ctx, o.cancel = context.WithCancel(context.Background())
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(s, tcpBuffer, maxDials, o.connect).HandlePacket)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, func(id stack.TransportEndpointID, packet *stack.PacketBuffer) bool {
		datagram, ok := packet.Data().PullUp(packet.Data().Size())
		return o.send(udp.NewForwarderRequest(s, id, packet.Clone()), ok && sniff.IsQUIC(datagram))
	})
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
// refused, when it is so outside, unless the policy needs to know more of it: then it is
// established first, and broken off if it may not be. It runs in a goroutine of its own.
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
	f := &tcpFlow{of: o, flow: o.flowTo(destination(request.ID()), smolvm.TCP)}
	v, err := o.check(&f.flow, netip.AddrPort{})
	if err == nil && v.Allowed {
		f.outside, err = o.dialChecked(&f.flow)
	}
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
		if f.outside != nil {
			_ = f.outside.Close()
		}
		return
	}
	f.guestConn = place.conn(endpoint, &queue)
	if f.outside == nil && !o.dialNamed(f) {
		f.Abort()
		return
	}
	if o.beginTCP(f) {
		defer o.endTCP(f)
		f.recheck() // the policy may have been changed since
	}
	stream.Splice(o.ctx, f, f.outside)
}

// dialNamed connects a flow to the outside that needs a name to be allowed, as soon as it has
// stated it. It reports whether it could.
func (o *outbound) dialNamed(f *tcpFlow) bool {
	defer context.AfterFunc(o.ctx, f.Abort)()
	if f.awaitName() != nil {
		return false
	}
	outside, err := o.dial(&f.flow)
	f.outside = outside
	return err == nil
}

func (o *outbound) beginTCP(f *tcpFlow) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.closed {
		o.tcp[f] = struct{}{}
	}
	return !o.closed
}

func (o *outbound) endTCP(f *tcpFlow) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.tcp, f)
}

// flowTo returns what is known of a flow before it has sent anything.
func (o *outbound) flowTo(to netip.AddrPort, protocol smolvm.Protocol) network.Flow {
	return network.Flow{Protocol: protocol, To: to, Names: network.Names{
		Asked: o.asked.of(to.Addr()),
		// Datagrams to the port of QUIC state a name, which can't be read.
		Hidden: protocol == smolvm.UDP && to.Port() == httpsPort,
	}}
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

// check returns the verdict on a flow, which is allowed or provisional, or an error that
// matches [errRefused]: by the policy, or because the address is the host's at the moment,
// which is noted in the flow, and the policy does not name the host. From is as for
// [hostRoutes.check].
func (o *outbound) check(f *network.Flow, from netip.AddrPort) (network.Verdict, error) {
	denied := func(v network.Verdict) bool { return !v.Allowed && !v.Provisional }
	other, host := *f, *f
	other.Host, host.Host = false, true
	asOther, asHost := o.verdict(other), o.verdict(host)
	if denied(asOther) && denied(asHost) {
		return asOther, refusal(other, asOther) // so the kernel need not be asked
	}
	own := o.routes.check(f.Protocol, from, f.To)
	if own == nil && from.Addr() == f.To.Addr() {
		own = fmt.Errorf("%s: %w: %w: it connects to itself", f.To, errRefused, errHost)
	}
	f.Host = own != nil
	switch {
	case own == nil && denied(asOther):
		return asOther, refusal(other, asOther)
	case own == nil:
		return asOther, nil
	case denied(asHost), !errors.Is(own, errHost):
		return asHost, own
	}
	return asHost, nil
}

// dial connects to the outside, if that is where the address is, and if the guest may.
func (o *outbound) dial(f *network.Flow) (net.Conn, error) {
	v, err := o.check(f, netip.AddrPort{})
	if err == nil && !v.Allowed {
		err = refusal(*f, v)
	}
	if err != nil {
		return nil, err
	}
	return o.dialChecked(f)
}

// dialChecked is dial of a flow that has been allowed just now.
func (o *outbound) dialChecked(f *network.Flow) (net.Conn, error) {
	dialer := net.Dialer{Timeout: dialTimeout}
	if f.Protocol == smolvm.UDP {
		dialer.Control = noBroadcast
	}
	conn, err := dialer.DialContext(o.ctx, string(f.Protocol)+"4", f.To.String())
	if err != nil {
		return nil, err
	}
	// Meanwhile the host may have been given the address, and only now is it known which
	// port and address of the host itself the kernel has chosen.
	from, remote := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
	if remote != f.To {
		err = fmt.Errorf("%s: %w: it is connected to %s", f.To, errRefused, remote)
	} else {
		var v network.Verdict
		if v, err = o.check(f, from); err == nil && !v.Allowed {
			err = refusal(*f, v)
		}
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
