package usernet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/intercept"
	"github.com/smolvm/smolvm/internal/network/outbound"
	"github.com/smolvm/smolvm/internal/network/resolver"
	"github.com/smolvm/smolvm/internal/stream"
)

// defaultMTU is Ethernet's.
const defaultMTU = 1500

// Network is the network of one VM.
type Network struct {
	config   Config
	stack    *stack.Stack
	link     *os.File
	conn     net.Conn // our end of the link
	endpoint *endpoint
	filter   atomic.Pointer[filter]
	services []io.Closer
	names    *resolver.Resolver
	sessions stream.Sessions // of UDP forwards
	outbound *outbound.Outbound
	// questions takes what is recorded of the guest's questions for names.
	questions network.LateRecorder
	limits    limits
	account   *account
	incoming  *kind // connections to the guest
	problem   error
	running   sync.WaitGroup // what serves the link and the services
	open      stream.Open    // forwards
}

// New makes the network. It serves the guest from then on, until Close.
func New(config Config) (*Network, error) {
	return newWith(config, usualLimits(), resolver.HostFiles())
}

func newWith(config Config, limits limits, files resolver.Files) (*Network, error) {
	if config.MTU == 0 {
		config.MTU = defaultMTU
	}
	if !hasIPv6() {
		config.Prefix6, config.Gateway6, config.Guest6 = netip.Prefix{}, netip.Addr{}, netip.Addr{}
	}
	filter, err := newFilter(config)
	if err != nil {
		return nil, fmt.Errorf("make user-space network: %w", err)
	}
	conn, link, err := newLink()
	if err != nil {
		return nil, err
	}
	n := &Network{config: config, conn: conn, link: link, limits: limits, account: newAccount(limits.linger), sessions: stream.Sessions{Limit: maxSessions}}
	n.names = resolver.New(resolver.Config{
		Files:   files,
		IPv6:    config.Guest6.IsValid(),
		MayKnow: func(name string, addr netip.Addr) bool { return n.outbound.MayKnow(name, addr) },
		Policy:  func() *network.Policy { return n.outbound.Policy() },
		Told:    func(name string, answer []dns.RR) { n.outbound.Names().Record(name, answer) },

		Recorder: &n.questions,
	})
	n.incoming = &kind{account: n.account, limit: limits.incoming}
	n.filter.Store(&filter)
	if err := n.build(filter.gatewayMAC); err != nil {
		return nil, errors.Join(fmt.Errorf("make user-space network: %w", err), n.Close())
	}
	return n, nil
}

// SetGuestMAC makes the network that of a guest with another hardware address.
func (n *Network) SetGuestMAC(mac string) error {
	config := n.config
	config.GuestMAC = mac
	filter, err := newFilter(config)
	if err != nil {
		return err
	}
	n.filter.Store(&filter)
	return nil
}

// Claim implements [network.Claimer].
func (n *Network) Claim(_ context.Context, config network.Config, _ string) error {
	if err := n.SetGuestMAC(config.GuestMAC); err != nil {
		return err
	}
	n.setRate(config.Rate)
	return nil
}

// Usage implements [network.Meter].
func (n *Network) Usage() (smolvm.NetworkUsage, error) {
	return smolvm.NetworkUsage{Received: n.endpoint.received.Load(), Sent: n.endpoint.sent.Load()}, nil
}

// setRate bounds what passes between the guest and the stack. It is called once more when the
// network is claimed.
func (n *Network) setRate(rate network.Rate) {
	p := newPace(rate)
	n.endpoint.pace.Swap(p).close()
	if p != nil && p.toGuest != nil {
		n.running.Go(func() { p.serve(n.endpoint.write) })
	}
}

// Problem returns what the network can't do on this host; nil if there is nothing. All else
// works.
func (n *Network) Problem() error { return n.problem }

// Search is the domains that the host's own resolver searches for names at the moment.
func (n *Network) Search() []string { return n.names.Search() }

// SetEgress implements [network.EgressSetter].
func (n *Network) SetEgress(egress network.Egress) error { return n.outbound.SetEgress(egress) }

// SetSecrets has secrets put into the guest's flows that begin from now on.
func (n *Network) SetSecrets(secrets *intercept.Interceptor) { n.outbound.SetSecrets(secrets) }

// SetRecorder implements [network.Recorded].
func (n *Network) SetRecorder(r network.Recorder) {
	n.outbound.SetRecorder(r)
	n.questions.SetRecorder(n.outbound.Recorder())
}

// EgressRevision implements [network.EgressSetter].
func (n *Network) EgressRevision() int64 { return n.outbound.EgressRevision() }

// Config returns the network as it was made: without IPv6 if the host has none.
func (n *Network) Config() Config { return n.config }

// hasIPv6 reports whether the host has a way out by IPv6: a route to some address of the
// Internet. Nothing is sent.
func hasIPv6() bool {
	conn, err := new(net.Dialer).DialContext(context.Background(), "udp6", net.JoinHostPort(somewhere6, "9")) // does not wait
	if err != nil {
		return false
	}
	own, ok := conn.LocalAddr().(*net.UDPAddr)
	_ = conn.Close()
	return ok && !own.IP.IsLoopback() && !own.IP.IsLinkLocalUnicast()
}

// somewhere6 is an address for documentation (RFC 3849): there is no other route to it than the
// default route.
const somewhere6 = "2001:db8::1"

// Link is the VMM's end: a datagram socket, each datagram one Ethernet frame.
func (n *Network) Link() network.Link { return network.Link{Socket: n.link} }

// DialGuest connects to a TCP port of the guest. The connection ends with the network. The
// error matches [network.ErrRefused] if nothing listens at the guest's address.
func (n *Network) DialGuest(ctx context.Context, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("connect to port %d of the guest: ports are 1 to 65535", port)
	}
	address := tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(n.config.Guest.As4()), Port: uint16(port)}
	conn, err := n.incoming.dialGuest(ctx, n.stack, address)
	if err != nil {
		return nil, fmt.Errorf("connect to port %d of the guest: %w", port, err)
	}
	return conn, nil
}

// Close ends all forwards and connections and the link, and returns when nothing of
// the network runs any more. It may be called again.
func (n *Network) Close() error {
	if !n.open.Close() {
		return nil
	}
	err := errors.Join(n.conn.Close(), n.link.Close())
	for _, service := range n.services {
		_ = service.Close()
	}
	if n.endpoint != nil {
		n.endpoint.pace.Load().close()
	}
	if n.stack != nil {
		n.outbound.Close()
		n.account.close()
		n.stack.Close()
		n.running.Wait()
		n.outbound.Wait()
		n.account.running.Wait()
		n.stack.Wait()
	}
	return err
}
