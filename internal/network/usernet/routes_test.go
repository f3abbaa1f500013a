package usernet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// The host's own addresses are closed however they are its own (S5). Each is set up, and a
// server of the host listens on it.
func TestHostsOwnAddresses(t *testing.T) {
	if !inOwnNetwork(t) {
		return
	}
	newOutside(t)
	listener, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	accepted := make(chan string, 100)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			accepted <- conn.LocalAddr().String()
			_ = conn.Close()
		}
	}()
	port := uint16(listener.Addr().(*net.TCPAddr).Port)
	n := newNetwork(t)
	g := newGuest(t, n)
	for _, test := range []struct {
		name, addr string
		setUp      []string
	}{
		{"secondary address", "198.51.100.7", []string{"addr add 198.51.100.7/24 dev host"}},
		{"local route with a source", "203.0.113.1", []string{"route add local 203.0.113.1/32 dev lo src 198.51.100.1"}},
		{"local network", "203.0.113.77", []string{"route add local 203.0.113.64/26 dev lo src 198.51.100.1"}},
		{"local route in another table", "203.0.113.2", []string{
			"route add local 203.0.113.2/32 dev lo src 198.51.100.1 table 77", "rule add to 203.0.113.2 lookup 77 pref 7",
		}},
		{"local route for a protocol", "203.0.113.3", []string{
			"route add local 203.0.113.3/32 dev lo src 198.51.100.1 table 78", "rule add ipproto tcp to 203.0.113.3 lookup 78 pref 8",
		}},
		{"broadcast route", "203.0.113.4", []string{"route add broadcast 203.0.113.4/32 dev host"}},
		{"black hole", "203.0.113.5", []string{"route add blackhole 203.0.113.5/32"}},
		{"address of an interface that is down", "203.0.113.129", []string{"link add idle type veth peer name idle2", "addr add 203.0.113.129/25 dev idle"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := runIP(test.setUp...); err != nil {
				t.Log(err) // not all kernels have all of this
				return
			}
			to := netip.AddrPortFrom(netip.MustParseAddr(test.addr), port)
			for _, network := range []string{"tcp4", "udp4"} {
				conn, err := n.outbound.dial(to, network)
				if err == nil {
					_ = conn.Close()
				}
				if network == "udp4" && test.name == "local route for a protocol" {
					continue
				}
				if !errors.Is(err, errRefused) {
					t.Errorf("dial by %s: %v, want %v", network, err, errRefused)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			conn, err := gonet.DialContextTCP(ctx, g.Stack, full(to), ipv4.ProtocolNumber)
			if err == nil {
				t.Error("the guest is connected to it")
				_ = conn.Close()
			}
		})
	}
	select {
	case addr := <-accepted:
		t.Errorf("the host's server has accepted a connection to %s", addr)
	default:
	}
}

// An address that becomes the host's own between the check and the connection stays
// closed.
func TestAddressBecomesHosts(t *testing.T) {
	if !inOwnNetwork(t) {
		return
	}
	var server net.PacketConn
	newOutside(t).run(func() (err error) {
		server, err = net.ListenPacket("udp4", outsideAddr.String()+":8080")
		return err
	})
	defer func() { _ = server.Close() }()
	n := newNetwork(t)
	outside, err := n.outbound.dial(netip.AddrPortFrom(outsideAddr, 8080), "udp4")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = outside.Close() }()
	f := &flow{outside: outside, check: func() error {
		return n.outbound.check("udp4", addrPort(outside.LocalAddr()), addrPort(outside.RemoteAddr()))
	}}
	if !f.stillAllowed() {
		t.Fatal("a flow to the outside is not allowed")
	}
	if err := runIP("addr add " + outsideAddr.String() + "/32 dev lo"); err != nil {
		t.Fatal(err)
	}
	f.checked = f.checked.Add(-flowCheck)
	if f.stillAllowed() {
		t.Error("a flow goes on to an address that is the host's now")
	}
}

// Where the kernel tells nothing of its routes, its interfaces' addresses are closed, and
// where it does not even tell these, everything is.
func TestRoutesUnknown(t *testing.T) {
	if !inOwnNetwork(t) {
		return
	}
	newOutside(t)
	if err := runIP("addr add 198.51.100.7/24 dev host"); err != nil {
		t.Fatal(err)
	}
	routes := hostRoutes{byInterface: true}
	for addr, refused := range map[string]bool{
		"198.51.100.1": true, "198.51.100.7": true, "198.51.100.0": true, "198.51.100.255": true, "127.0.0.1": true,
		"198.51.100.2": false, "203.0.113.1": false,
	} {
		err := routes.check(unix.IPPROTO_TCP, netip.AddrPort{}, netip.AddrPortFrom(netip.MustParseAddr(addr), 1))
		if errors.Is(err, errRefused) != refused {
			t.Errorf("%s: %v, want refused: %t", addr, err, refused)
		}
	}
	if _, err := newHostRoutes(); err != nil {
		t.Errorf("routes of this kernel: %v", err)
	}
}

func TestPolicy(t *testing.T) {
	named := netip.MustParseAddr("169.254.169.254")
	p := policy{inside: testConfig().Prefix}
	open := policy{inside: testConfig().Prefix, metadata: []netip.Addr{named, netip.MustParseAddr("168.63.129.16")}}
	for _, test := range []struct {
		addr             string
		allowed, ifNamed bool
	}{
		{"192.0.2.1", true, true},
		{"10.0.3.1", true, true},
		{"10.0.2.2", false, false},
		{"0.0.0.0", false, false},
		{"0.1.2.3", false, false},
		{"127.0.0.1", false, false},
		{"127.1.2.3", false, false},
		{"::ffff:127.0.0.1", false, false},
		{"224.0.0.1", false, false},
		{"255.255.255.255", false, false},
		{"169.254.169.254", false, true},
		{"::ffff:169.254.169.254", false, true},
		{"169.254.170.2", false, false},
		{"168.63.129.16", false, true},
		{"100.100.100.200", false, false},
		{"192.0.0.192", false, false},
		{"fd00:ec2::254", false, false},
		{"fd20:ce::254", false, false},
		{"fe80::1", false, false},
		{"2001:db8::1", true, true},
	} {
		addr := netip.MustParseAddr(test.addr)
		for p, want := range map[*policy]bool{&p: test.allowed, &open: test.ifNamed} {
			if err := p.allows("", addr, 80); (err == nil) != want || err != nil && !errors.Is(err, errRefused) {
				t.Errorf("%s with %v open: %v, want allowed: %t", addr, p.metadata, err, want)
			}
		}
	}
}

// The metadata services of clouds are closed, though there is a way to them (S6).
func TestMetadataServicesClosed(t *testing.T) {
	if !inOwnNetwork(t) {
		return
	}
	newOutside(t)
	if err := runIP("route add default via " + outsideAddr.String()); err != nil {
		t.Fatal(err)
	}
	n := newNetwork(t)
	for _, addr := range metadataServices {
		if !addr.Is4() {
			continue
		}
		conn, err := n.outbound.dial(netip.AddrPortFrom(addr, 80), "udp4")
		if !errors.Is(err, errRefused) {
			t.Errorf("dial %s: %v, want %v", addr, err, errRefused)
		}
		if err == nil {
			_ = conn.Close()
		}
	}
}
