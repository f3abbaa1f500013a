package usernet

import (
	"net"
	"net/netip"
	"testing"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/policytest"
	"github.com/smolvm/smolvm/internal/network/resolver"
)

// newWorld makes a world, with servers on these ports, and a guest in it. The caller is in a
// network of its own.
func newWorld(t *testing.T, ports policytest.Ports) (*policytest.World, *Network) {
	t.Helper()
	w := policytest.NewWorld(t, ports)
	var files resolver.Files
	files.ResolvConf, files.Hosts = w.Files()
	n := newWithFiles(t, usualLimits(), files)
	g := newGuest(t, n)
	w.Plane = policytest.Plane{
		EgressSetter: n,
		DialTCP:      g.dialTCP,
		DialUDP:      func(to netip.AddrPort) (net.Conn, error) { return g.dialUDP(to), nil },
		Resolver:     testConfig().Gateway,
		SetClock:     n.outbound.Names().SetClock,
		Carried:      carried,
	}
	return w, n
}

// carried reports whether packets of a flow are let into the network at all.
func carried(f network.Flow) bool {
	switch {
	case f.VMs: // no other VMs are in the network
	case f.To.Addr().IsMulticast(): // nobody is told that a datagram to many was refused (RFC 1122, section 3.2.2)
	case f.Protocol == network.ICMP, !f.To.Addr().Is4():
	default:
		return true
	}
	return false
}

// The table of the policy, with real packets of a guest.
func TestConformance(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, _ := newWorld(t, policytest.CasePorts(t))
	w.Conformance(85)
}

func TestChangeInMidFlow(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, _ := newWorld(t, policytest.FlowPorts())
	w.ChangeInMidFlow()
}

func TestFirstBytesOfGuest(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, _ := newWorld(t, policytest.FlowPorts())
	w.FirstBytes()
}

func TestNameBeforeConnecting(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, n := newWorld(t, policytest.FlowPorts())
	w.NameBeforeConnecting()
	// Closing the network ends the one that waits.
	if err := n.Close(); err != nil {
		t.Error(err)
	}
}

// Of what the network does not carry nothing gets in, whatever the policy says.
func TestNotCarried(t *testing.T) {
	n := newNetwork(t)
	config := testConfig()
	ping := ipPacket(config.Guest, nettest.OutsideAddr(), protocolICMP, []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0})
	const etherTypeIPv6 = 0x86dd
	for name, frame := range map[string][]byte{
		"ICMP": ethernet(config, etherTypeIPv4, ping),
		"IPv6": ethernet(config, etherTypeIPv6, append([]byte{0x60}, make([]byte, 59)...)),
	} {
		if n.admit(frame) {
			t.Errorf("%s is let in", name)
		}
	}
}
