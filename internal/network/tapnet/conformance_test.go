package tapnet

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/policytest"
	"github.com/smolvm/smolvm/internal/network/resolver"
)

// newPolicyWorld makes a world, with servers on these ports, and a guest in it. The caller is in
// a network of its own.
func newPolicyWorld(t *testing.T, ports policytest.Ports) (*policytest.World, *Network, guest) {
	t.Helper()
	w := policytest.NewWorld(t, ports)
	open := func(c *network.Config) { c.OpenToVMs = true }
	var files resolver.Files
	files.ResolvConf, files.Hosts = w.Files()
	n := newNetworkWith(t, 2, open, files)
	g := connectGuest(t, n)
	other := connectGuest(t, newNetworkWith(t, 3, open, files))
	must(t, other.Do(func() error { return w.Serve(policytest.Ports{TCP: ports.TCP}) }))
	w.Plane = policytest.Plane{
		EgressSetter: n,
		DialTCP:      g.dialer("tcp"),
		DialUDP:      g.dialer("udp"),
		Resolver:     g.config.Gateway,
		SetClock:     n.out.Load().Names().SetClock,
		Carried:      isCarriedFlow,
	}
	return w, n, g
}

// isCarriedFlow reports whether a test can have the flow.
func isCarriedFlow(f network.Flow) bool {
	// Nobody is told that a datagram to many was refused (RFC 1122, section 3.2.2).
	return !f.To.Addr().IsMulticast() && f.Protocol != network.ICMP
}

// dialer returns what connects the guest.
func (g guest) dialer(protocol string) func(to netip.AddrPort) (net.Conn, error) {
	return func(to netip.AddrPort) (conn net.Conn, err error) {
		err = g.Do(func() error {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			conn, err = new(net.Dialer).DialContext(ctx, protocol, to.String())
			return err
		})
		return conn, err
	}
}

// The table of the policy, with real packets of a guest.
func TestConformance(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, _, _ := newPolicyWorld(t, policytest.CasePorts(t))
	w.Conformance(100)
}

func TestChangeInMidFlow(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, _, _ := newPolicyWorld(t, policytest.FlowPorts())
	w.ChangeInMidFlow()
}

func TestFirstBytesOfGuest(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, _, _ := newPolicyWorld(t, policytest.FlowPorts())
	w.FirstBytes()
}

func TestNameBeforeConnecting(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, n, _ := newPolicyWorld(t, policytest.FlowPorts())
	conn := w.NameBeforeConnecting()
	// Closing the network ends the one that waits. The guest is not told, as it has no network
	// any more.
	must(t, n.Close())
	_ = conn.SetReadDeadline(time.Now())
}
