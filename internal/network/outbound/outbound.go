// Package outbound lets the flows of one guest out, through sockets of this process, as far as
// its egress policy allows: it judges them by where they go and by the names that they state,
// connects them, and ends them when the policy changes. It does not know how the guest's
// packets get to it.
package outbound

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

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/intercept"
	"github.com/smolvm/smolvm/internal/stream"
)

const (
	// httpsPort is also that of HTTP over QUIC.
	httpsPort = 443
	// dialTimeout is about what Linux allows a connection by default, less what the
	// guest has waited already.
	dialTimeout = 2 * time.Minute
)

// Config describes whose way out it is.
type Config struct {
	// Inside are the networks of VMs, in which there is no host that a guest may reach unless
	// it may reach other VMs.
	Inside []netip.Prefix
	// MayReachVM reports whether the guest may reach the VM with an address, where its policy
	// allows it. Nil: it reaches none by a TAP interface of the host.
	MayReachVM func(netip.Addr) bool
	// Metadata are the metadata services of clouds that the guest may reach.
	Metadata []netip.Addr
	// Egress is the policy at first. Nil: what is not closed always is open.
	Egress *network.Egress
}

// Outbound is the guest's way out: what it sends to the outside is sent from sockets
// of this process. So the host trusts it as if it came from the host; what listens
// on the host for the host alone must be out of its reach.
type Outbound struct {
	config Config
	policy atomic.Pointer[network.Policy]
	// secrets are put into flows; nil: there are none.
	secrets atomic.Pointer[intercept.Interceptor]
	names   Names
	routes  hostRoutes
	late    network.LateRecorder
	ctx     context.Context
	cancel  context.CancelFunc

	mu       sync.Mutex // guards the following
	closed   bool
	revision int64 // of the policy
	tcp      map[*tcpFlow]struct{}
	flows    map[*flow]struct{} // over UDP
	running  sync.WaitGroup     // counts connections being made, and flows
}

// GuestConn is a TCP connection with the guest.
type GuestConn interface {
	net.Conn
	CloseWrite() error
	// Abort closes the connection at once, and has the guest told that it was broken off.
	Abort()
}

// Request is a TCP connection that the guest has asked for, and that is not established yet.
// One of its methods is called, once.
type Request interface {
	// Accept establishes the connection.
	Accept() (GuestConn, error)
	// Refuse has the guest told that nothing listens there.
	Refuse()
}

// New makes the way out of a guest, for as long as it is not closed. An error says what it
// can't do on this host; what is returned can be used all the same.
func New(config Config) (*Outbound, error) {
	routes, err := newHostRoutes()
	o := &Outbound{config: config, routes: routes, tcp: map[*tcpFlow]struct{}{}, flows: map[*flow]struct{}{}}
	var egress network.Egress
	if config.Egress != nil {
		egress = *config.Egress
	}
	o.revision = egress.Revision
	o.policy.Store(policyOf(config.Metadata, egress.Policy))
	o.ctx, o.cancel = context.WithCancel(context.Background())
	return o, err
}

// Names returns what the guest was told of names; whoever answers its questions records it
// there.
func (o *Outbound) Names() *Names { return &o.names }

// Flows returns the flows that are open.
func (o *Outbound) Flows() []network.Flow {
	o.mu.Lock()
	defer o.mu.Unlock()
	open := make([]network.Flow, 0, len(o.tcp)+len(o.flows))
	for f := range o.tcp {
		open = append(open, f.known())
	}
	for f := range o.flows {
		open = append(open, f.known())
	}
	return open
}

// Close lets nothing new begin, and ends what there is; Wait waits for that.
func (o *Outbound) Close() {
	o.cancel()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	for f := range o.flows {
		f.close()
	}
}

// Wait returns when nothing of a closed way out runs any more.
func (o *Outbound) Wait() { o.running.Wait() }

// Connect makes one TCP connection of the guest, and returns when it has ended. The guest
// sees it established, or refused, when it is so outside, unless the policy needs to know more
// of it: then it is established first, and broken off if it may not be.
func (o *Outbound) Connect(to netip.AddrPort, request Request) {
	if !o.begin() {
		request.Refuse()
		return
	}
	defer o.running.Done()
	f := &tcpFlow{of: o, flow: o.flowTo(to, smolvm.TCP)}
	v, err := o.check(&f.flow, netip.AddrPort{})
	if err == nil && v.Allowed && !o.hasSecrets(to.Port()) {
		f.outside, err = o.dialChecked(o.ctx, &f.flow)
	}
	if err != nil {
		o.recordFailure(f.flow, err)
		request.Refuse()
		return
	}
	if f.GuestConn, err = request.Accept(); err != nil {
		if f.outside != nil {
			_ = f.outside.Close()
		}
		return
	}
	if f.outside == nil {
		if err := o.awaitName(f); err != nil {
			o.recordFailure(f.known(), err)
			f.Abort()
			return
		}
	}
	if o.carrySecrets(f) {
		return
	}
	if f.outside == nil {
		if err := o.dialNamed(f); err != nil {
			o.recordFailure(f.known(), err)
			f.Abort()
			return
		}
	}
	o.beginRecord(&f.recording, f.known(), f.verdict(false))
	defer func() { o.endRecord(&f.recording, f.known(), f.verdict(f.named.Load())) }()
	if o.beginTCP(f) {
		defer o.endTCP(f)
		f.recheck() // the policy may have been changed since
	}
	stream.Splice(o.ctx, f, f.outside)
}

// awaitName waits until a flow has stated its name, or will not any more. The error matches
// [ErrRefused] if it may not have it.
func (o *Outbound) awaitName(f *tcpFlow) error {
	defer context.AfterFunc(o.ctx, f.Abort)()
	return f.awaitName()
}

// dialNamed connects a flow to the outside whose name is known.
func (o *Outbound) dialNamed(f *tcpFlow) error {
	defer context.AfterFunc(o.ctx, f.Abort)()
	outside, err := o.dial(&f.flow)
	f.outside = outside
	return err
}

func (o *Outbound) beginTCP(f *tcpFlow) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.closed {
		o.tcp[f] = struct{}{}
	}
	return !o.closed
}

func (o *Outbound) endTCP(f *tcpFlow) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.tcp, f)
}

// flowTo returns what is known of a flow before it has sent anything.
func (o *Outbound) flowTo(to netip.AddrPort, protocol smolvm.Protocol) network.Flow {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	return network.Flow{Protocol: protocol, To: to, Names: network.Names{
		Asked: o.names.Of(to.Addr()),
		// Datagrams to the port of QUIC state a name, which can't be read.
		Hidden: protocol == smolvm.UDP && to.Port() == httpsPort,
	}}
}

// begin counts a connection, unless there are to be no more.
func (o *Outbound) begin() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.closed {
		o.running.Add(1)
	}
	return !o.closed
}

// check returns the verdict on a flow, which is allowed or provisional, or an error that
// matches [ErrRefused]: by the policy, or because the address is the host's at the moment,
// which is noted in the flow, and the policy does not name the host. From is as for
// [hostRoutes.check].
func (o *Outbound) check(f *network.Flow, from netip.AddrPort) (network.Verdict, error) {
	denied := func(v network.Verdict) bool { return !v.Allowed && !v.Provisional }
	other, host := *f, *f
	other.Host, host.Host = false, true
	asOther, asHost := o.verdict(other), o.verdict(host)
	if denied(asOther) && denied(asHost) {
		return asOther, refusal(other, asOther) // so the kernel need not be asked
	}
	byTAP, own := o.routes.check(f.Protocol, from, f.To)
	if own == nil && from.Addr() == f.To.Addr() {
		own = fmt.Errorf("%s: %w: %w: it connects to itself", f.To, ErrRefused, errHost)
	}
	f.Host = own != nil
	if byTAP && !f.VMs {
		f.VMs, other.VMs = true, true
		asOther = o.verdict(other)
	}
	if own == nil && !denied(asOther) && !o.mayReachVM(f.To.Addr(), byTAP) {
		return asOther, fmt.Errorf("%s: %w: it is that of a VM which is not open to this one", f.To, ErrRefused)
	}
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

// mayReachVM reports whether the guest may reach an address, if it is that of a VM.
func (o *Outbound) mayReachVM(addr netip.Addr, byTAP bool) bool {
	switch {
	case !byTAP && !o.isInside(addr):
		return true
	case o.config.MayReachVM == nil:
		return !byTAP
	}
	return o.config.MayReachVM(addr)
}

// dial connects to the outside, if that is where the address is, and if the guest may.
func (o *Outbound) dial(f *network.Flow) (net.Conn, error) { return o.dialWithin(o.ctx, f) }

// dialWithin is dial for as long as ctx is not done.
func (o *Outbound) dialWithin(ctx context.Context, f *network.Flow) (net.Conn, error) {
	v, err := o.check(f, netip.AddrPort{})
	if err == nil && !v.Allowed {
		err = refusal(*f, v)
	}
	if err != nil {
		return nil, err
	}
	return o.dialChecked(ctx, f)
}

// dialChecked is dial of a flow that has been allowed just now.
func (o *Outbound) dialChecked(ctx context.Context, f *network.Flow) (net.Conn, error) {
	dialer := net.Dialer{Timeout: dialTimeout}
	if f.Protocol == smolvm.UDP {
		dialer.Control = noBroadcast
	}
	family := "4"
	if f.To.Addr().Is6() {
		family = "6"
	}
	conn, err := dialer.DialContext(ctx, string(f.Protocol)+family, f.To.String())
	if err != nil {
		return nil, err
	}
	// Meanwhile the host may have been given the address, and only now is it known which
	// port and address of the host itself the kernel has chosen.
	from, remote := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
	if remote != f.To {
		err = fmt.Errorf("%s: %w: it is connected to %s", f.To, ErrRefused, remote)
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
