package usernet

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/smolvm/smolvm/internal/network/resolver"
)

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testConfig() Config {
	return Config{
		Prefix:   netip.MustParsePrefix("10.0.2.0/24"),
		Gateway:  netip.MustParseAddr("10.0.2.2"),
		Guest:    netip.MustParseAddr("10.0.2.15"),
		GuestMAC: "02:00:AC:10:00:02", // in capitals, as a user may write it
	}
}

func newNetwork(t testing.TB) *Network {
	t.Helper()
	return newLimited(t, usualLimits())
}

func newLimited(t testing.TB, limits limits) *Network {
	t.Helper()
	return newWithFiles(t, limits, resolver.HostFiles())
}

func newWithFiles(t testing.TB, limits limits, files resolver.Files) *Network {
	t.Helper()
	n, err := newWith(testConfig(), limits, files)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return n
}

// linkConn is the guest's end of the link as a connection, in place of a VMM.
func linkConn(t testing.TB, n *Network) net.Conn {
	t.Helper()
	conn, err := net.FileConn(n.Link().Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// guest is a TCP/IP stack on the link: a guest without a VM.
type guest struct {
	testing.TB
	*stack.Stack
	link net.Conn
}

// newGuest makes a guest with a static configuration.
func newGuest(t testing.TB, n *Network) *guest {
	t.Helper()
	return newGuestMTU(t, n, defaultMTU)
}

func newGuestMTU(t testing.TB, n *Network, mtu uint32) *guest {
	t.Helper()
	config := testConfig()
	link := &endpoint{
		conn: linkConn(t, n), mtu: mtu, mac: parseMAC(config.GuestMAC),
		admit: func(frame []byte) bool { return len(frame) > header.EthernetMinimumSize },
	}
	s, err := newStack(Config{Prefix: config.Prefix, Gateway: config.Guest}, link)
	if err != nil {
		t.Fatal(err)
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFrom4(config.Gateway.As4()), NIC: nicID},
	})
	_ = s.SetPromiscuousMode(nicID, false)
	_ = s.SetSpoofing(nicID, false)
	g := &guest{t, s, link.conn}
	done := make(chan struct{})
	go func() {
		defer close(done)
		link.serve()
	}()
	t.Cleanup(func() {
		_ = g.link.Close()
		<-done
		s.Destroy()
	})
	return g
}

func full(address netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(address.Addr().As4()), Port: address.Port()}
}

// echoPort is where a guest of the tests listens.
const echoPort = 8080

// listen serves each connection to the guest's echoPort.
func (g *guest) listen(serve func(net.Conn)) {
	g.Helper()
	listener, err := gonet.ListenTCP(g.Stack, full(netip.AddrPortFrom(testConfig().Guest, echoPort)), ipv4.ProtocolNumber)
	if err != nil {
		g.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				serve(conn)
			}()
		}
	}()
	g.Cleanup(func() {
		_ = listener.Close()
		<-done
	})
}

func (g *guest) dialTCP(to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(g.Context(), patience)
	defer cancel()
	return gonet.DialContextTCP(ctx, g.Stack, full(to), ipv4.ProtocolNumber)
}

func (g *guest) dialUDP(to netip.AddrPort) net.Conn {
	g.Helper()
	address := full(to)
	conn, err := gonet.DialUDP(g.Stack, nil, &address, ipv4.ProtocolNumber)
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { _ = conn.Close() })
	return conn
}

// listenHost listens on the host's loopback.
func listenHost(t testing.TB) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return listener
}
