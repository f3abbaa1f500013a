package tapnet

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

// On a bridge, guests are hosts of its network: they reach its other ports, but not each
// other unless they are open, and send with no hardware address but their own.
func TestBridge(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	const lanAddr, firstAddr, secondAddr = "192.0.2.1", "192.0.2.11", "192.0.2.12"
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br-lan"}}
	must(t, netlink.LinkAdd(bridge))
	must(t, nettest.Configure("br-lan"))
	lan := nettest.New(t)
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "port0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(lan.FD())}
	must(t, netlink.LinkAdd(veth))
	must(t, netlink.LinkSetMaster(veth, bridge))
	must(t, nettest.Configure("port0"))
	must(t, lan.Do(func() error { return errors.Join(nettest.Configure("eth0", lanAddr+"/24"), serve(t, lanAddr)) }))

	connect := func(lease int, addr string, change func(*network.Config)) (*Network, guest) {
		at, err := network.Plan(network.Bridge, lease)
		must(t, err)
		n := newNetwork(t, lease, func(c *network.Config) {
			*c = at.Config()
			c.Bridge = "br-lan"
			if change != nil {
				change(c)
			}
		})
		g := newGuest(t, n)
		must(t, g.Do(func() error { return errors.Join(nettest.Configure("eth0", addr+"/24"), serve(t, addr)) }))
		return n, g
	}
	first, one := connect(2, firstAddr, nil)
	_, other := connect(3, secondAddr, nil)
	mustReach(t, one, "tcp", lanAddr, firstAddr)
	mustReach(t, lan, "tcp", firstAddr, lanAddr)
	mustReach(t, other, "udp", lanAddr, secondAddr)
	mustNotReach(t, one, "tcp", secondAddr)

	_, third := connect(4, "192.0.2.13", func(c *network.Config) { c.OpenToVMs = true })
	_, fourth := connect(5, "192.0.2.14", func(c *network.Config) { c.OpenToVMs = true })
	mustReach(t, third, "tcp", "192.0.2.14", "192.0.2.13")
	mustReach(t, fourth, "tcp", lanAddr, "192.0.2.14")

	mac := "02:00:00:00:00:99"
	parsed, err := net.ParseMAC(mac)
	must(t, err)
	must(t, one.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		return errors.Join(err, netlink.LinkSetHardwareAddr(link, parsed))
	}))
	mustNotReach(t, one, "udp", lanAddr)
	must(t, first.SetGuestMAC(mac))
	mustReach(t, one, "udp", lanAddr, firstAddr)
	if err := first.SetGuestMAC("none"); err == nil {
		t.Error("a hardware address that is none is taken")
	}
	if _, err := first.DialGuest(t.Context(), echoPort); !errors.Is(err, smolvm.ErrUnsupported) || smolvm.HintOf(err) == "" {
		t.Errorf("connect to a guest on a bridge: %v", err)
	}
}

// What a guest is sent, and what it sends, takes the time that the rate leaves it.
func TestRate(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	// What passes at once is the burst, and from the guest that and what passes in a second.
	const bits = 2_000_000
	const free = minBurst + bits/bitsPerByte
	const size = free + bits/bitsPerByte/2
	for _, test := range []struct {
		what    string
		bounded bool
		rate    network.Rate
	}{
		{"unbounded", false, network.Rate{}},
		{"to the guest", true, network.Rate{ToGuest: bits}},
		{"from the guest", true, network.Rate{FromGuest: bits}},
	} {
		t.Run(test.what, func(t *testing.T) {
			n := newNetwork(t, 2, func(c *network.Config) { c.Rate = test.rate })
			g := newGuest(t, n)
			var took time.Duration
			must(t, g.Do(func() error {
				conn, err := net.Dial("tcp", net.JoinHostPort(farAddr, "7"))
				if err != nil {
					return err
				}
				defer func() { _ = conn.Close() }()
				begin := time.Now()
				sent := make(chan error, 1)
				go func() {
					_, err := conn.Write(make([]byte, size))
					sent <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
				}()
				received, err := io.Copy(io.Discard, conn)
				took = time.Since(begin)
				if received < size {
					err = errors.Join(err, errors.New("it is cut short"))
				}
				return errors.Join(err, <-sent)
			}))
			t.Logf("%s: %d bytes there and back in %v", test.what, size, took)
			// A bucket lets no more than this pass, however slow or fast the host is.
			least := time.Duration(size-free) * time.Second / (bits / bitsPerByte)
			if test.bounded && took < least {
				t.Errorf("%d bytes took %v, at least %v is what the rate leaves them", size, took, least)
			}
		})
	}
}

// A guest that has another hardware address is found by it.
func TestSetGuestMAC(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	n := newNetwork(t, 2, nil)
	g := newGuest(t, n)
	mustReach(t, theHost{}, "tcp", g.config.Guest.String(), g.config.Gateway.String())
	const mac = "02:00:00:00:00:99"
	parsed, err := net.ParseMAC(mac)
	must(t, err)
	must(t, g.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		return errors.Join(err, netlink.LinkSetHardwareAddr(link, parsed))
	}))
	must(t, n.SetGuestMAC(mac))
	for _, addr := range []netip.Addr{g.config.Guest, g.config.Guest6} {
		if _, err := reach(theHost{}, "tcp", addr.String(), patience); err != nil {
			t.Errorf("%s with its new hardware address: %v", addr, err)
		}
	}
	if err := n.SetGuestMAC("02:00"); err == nil {
		t.Error("a hardware address that is none is taken")
	}
}

// Each guest has its own name server at the same address, which says what the host would be
// told, but no address that is closed to the guest.
func TestNames(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	n := newNetwork(t, 2, nil)
	one, other := newGuest(t, n), newGuest(t, newNetwork(t, 3, nil))
	mustResolve(t, one)
	mustResolve(t, other)
	for _, test := range []struct {
		name string
		kind uint16
		want []string
	}{
		{"named.example.", dns.TypeA, []string{"192.0.2.77"}},
		{"named.example.", dns.TypeAAAA, []string{"2001:db8:77::1"}},
		{"own.example.", dns.TypeA, []string{farAddr}}, // as the server outside says
	} {
		if addrs, err := lookUp(one, "udp", test.name, test.kind); err != nil || !slices.Equal(addrs, test.want) {
			t.Errorf("%s: %q, %v; want %q", test.name, addrs, err, test.want)
		}
	}
	if search := n.Search(); !slices.Equal(search, []string{"corp.example"}) {
		t.Errorf("it searches %q", search)
	}
	// A guest that keeps its connections gets no more than it may have, and does not keep
	// the network from its end.
	var kept []net.Conn
	must(t, one.Do(func() error {
		for range 2 * maxNameConns {
			conn, err := net.Dial("tcp", net.JoinHostPort(one.config.Gateway.String(), "53"))
			if err != nil {
				return err
			}
			kept = append(kept, conn)
		}
		return nil
	}))
	must(t, n.Close())
	for _, conn := range kept {
		_ = conn.Close()
	}
	mustResolve(t, other)
}

// Where a name server of the host listens everywhere, guests have none of their own, and don't
// get that one.
func TestNamesOfTheHost(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	must(t, serve(t, "0.0.0.0"))
	n := newNetwork(t, 2, nil)
	g := newGuest(t, n)
	if err := n.Problem(); err == nil || !strings.Contains(err.Error(), "the guest has no name server") {
		t.Errorf("the problem is %v", err)
	}
	mustReach(t, g, "tcp", farAddr, hostAddr)
	err := g.Do(func() error {
		_, err := ask("tcp", g.config.Gateway.String(), dnsPort, impatience)
		return err
	})
	if err == nil {
		t.Error("the guest reaches the host's name server")
	}
}
