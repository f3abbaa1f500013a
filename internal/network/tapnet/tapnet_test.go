package tapnet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

// What passes and what does not, without firewalls of others.
func TestReach(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	out := newOutside(t)
	must(t, serve(t, hostAddr, hostAddr6, "127.0.0.1")) // what listens on the host
	first, second := newNetwork(t, 2, nil), newNetwork(t, 3, nil)
	one, other := newGuest(t, first), newGuest(t, second)
	if err := first.Problem(); err != nil {
		t.Error(err)
	}
	oneAddr, otherAddr := one.config.Guest.String(), other.config.Guest.String()
	oneAddr6, otherAddr6 := one.config.Guest6.String(), other.config.Guest6.String()
	gateway, gateway6 := one.config.Gateway.String(), one.config.Gateway6.String()
	host := theHost{}
	must(t, errors.Join(serveEcho(t, gateway), serveEcho(t, gateway6)))
	for _, test := range []struct {
		what string
		from place
		to   string
		as   string // empty: it must not be reached
	}{
		{"the outside by NAT", one, farAddr, hostAddr},
		{"the host's neighbor by NAT", one, outsideAddr, hostAddr},
		{"the outside by NAT of IPv6", one, farAddr6, hostAddr6},
		{"a guest from the host", host, oneAddr, gateway},
		{"a guest from the host by IPv6", host, oneAddr6, gateway6},
		{"a guest from itself", one, oneAddr, oneAddr},
		{"another guest", one, otherAddr, ""},
		{"another guest by IPv6", one, otherAddr6, ""},
		{"the address of no guest", one, strayAddr, ""},
		{"the address of no guest by IPv6", one, strayAddr6, ""},
		{"the host by its gateway", one, gateway, ""},
		{"the host by its gateway of IPv6", one, gateway6, ""},
		{"the host by its address", one, hostAddr, ""},
		{"the host by its address of IPv6", one, hostAddr6, ""},
		{"the host's loopback", one, "127.0.0.1", ""},
		{"metadata by link-local address", one, metadataAddr, ""},
		{"metadata by address", one, wireAddr, ""},
		{"metadata by IPv6", one, metadataAddr6, ""},
		{"a guest from outside", out, oneAddr, ""},
		{"a guest from outside by IPv6", out, oneAddr6, ""},
	} {
		for _, protocol := range []string{"tcp", "udp"} {
			t.Run(test.what+"/"+protocol, func(t *testing.T) {
				if test.as == "" {
					mustNotReach(t, test.from, protocol, test.to)
					return
				}
				mustReach(t, test.from, protocol, test.to, test.as)
			})
		}
	}
	t.Run("servers that must not be reached are there", func(t *testing.T) {
		mustReach(t, out, "tcp", hostAddr, outsideAddr)
		mustReach(t, host, "udp", gateway, gateway)
		mustReach(t, host, "tcp", gateway6, gateway6)
		for _, addr := range []string{metadataAddr, wireAddr, metadataAddr6, strayAddr, strayAddr6} {
			if _, err := reach(host, "udp", addr, patience); err != nil {
				t.Errorf("%s from the host: %v", addr, err)
			}
		}
	})
	t.Run("pings", func(t *testing.T) {
		for _, addr := range []string{gateway, gateway6, farAddr, farAddr6} {
			if !ping(one, addr, patience) {
				t.Errorf("%s does not answer", addr)
			}
		}
		for _, addr := range []string{hostAddr, hostAddr6, otherAddr, otherAddr6, wireAddr, metadataAddr6} {
			if ping(one, addr, impatience) {
				t.Errorf("%s answers", addr)
			}
		}
	})
	t.Run("names and pages", func(t *testing.T) {
		must(t, one.Do(func() error {
			reply, _, err := new(dns.Client).Exchange(new(dns.Msg).SetQuestion("far.example.", dns.TypeA), net.JoinHostPort(farAddr, "53"))
			if err != nil || len(reply.Answer) != 1 {
				return fmt.Errorf("ask for a name: %v, %w", reply, err)
			}
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: new(net.Dialer).DialContext}}
			page, err := client.Get("http://" + reply.Answer[0].(*dns.A).A.String() + "/")
			if err != nil {
				return err
			}
			defer func() { _ = page.Body.Close() }()
			text, err := io.ReadAll(page.Body)
			if string(text) != "hello "+farAddr {
				err = errors.Join(err, fmt.Errorf("the page says %q", text))
			}
			return err
		}))
	})
	t.Run("the host tells none of its other addresses by ARP", func(t *testing.T) {
		must(t, one.Do(func() error { return nettest.Route(hostAddr+"/32", "", "eth0") }))
		mustNotReach(t, one, "tcp", hostAddr)
		must(t, one.Do(func() error {
			neighbors, err := netlink.NeighList(0, unix.AF_INET)
			if slices.ContainsFunc(neighbors, func(n netlink.Neigh) bool { return n.IP.String() == hostAddr && len(n.HardwareAddr) > 0 }) {
				err = fmt.Errorf("the guest knows who has %s", hostAddr)
			}
			return err
		}))
	})
}

// What has another's address as its source does not get out, even where the kernel does not
// compare it with its routes (rp_filter; it does not for IPv6).
func TestSpoofedSource(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	out := newOutside(t)
	one, other := newGuest(t, newNetwork(t, 2, nil)), newGuest(t, newNetwork(t, 3, nil))
	for _, name := range []string{"all", one.config.TAP} {
		must(t, setSysctl("ipv4/conf/"+name+"/rp_filter", "0"))
	}
	const port = "9999"
	for _, test := range []struct {
		to          string
		own, forged netip.Addr
	}{
		{farAddr, one.config.Guest, other.config.Guest},
		{farAddr, one.config.Guest, netip.MustParseAddr(strayAddr)},
		{farAddr6, one.config.Guest6, other.config.Guest6},
		{farAddr6, one.config.Guest6, netip.MustParseAddr(strayAddr6)},
	} {
		t.Run(test.forged.String(), func(t *testing.T) {
			var server net.PacketConn
			must(t, out.Do(func() (err error) {
				server, err = net.ListenPacket("udp", net.JoinHostPort(test.to, port))
				return err
			}))
			defer func() { _ = server.Close() }()
			send := func(from netip.Addr) {
				must(t, one.Do(func() error {
					if err := nettest.Configure("eth0", single(from).String()); err != nil {
						return err
					}
					dialer := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
					conn, err := dialer.Dial("udp", net.JoinHostPort(test.to, port))
					if err != nil {
						return err
					}
					defer func() { _ = conn.Close() }()
					_, err = fmt.Fprint(conn, from)
					return err
				}))
			}
			// Packets don't overtake each other, and neighbors are known after the first.
			mustReach(t, one, "udp", test.to, map[bool]string{true: hostAddr, false: hostAddr6}[test.own.Is4()])
			send(test.forged)
			must(t, one.Do(func() error {
				link, err := netlink.LinkByName("eth0")
				return errors.Join(err, netlink.AddrDel(link, &netlink.Addr{IPNet: single(test.forged)}))
			}))
			send(test.own)
			must(t, server.SetReadDeadline(time.Now().Add(patience)))
			datagram := make([]byte, 100)
			size, from, err := server.ReadFrom(datagram)
			if err != nil || string(datagram[:size]) != test.own.String() {
				t.Errorf("first came %q from %v, %v; want %s", datagram[:size], from, err, test.own)
			}
		})
	}
}

// What an option opens is open, and nothing else.
func TestOptions(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	open := func(c *network.Config) { c.OpenToVMs = true }
	first, second := newGuest(t, newNetwork(t, 2, open)), newGuest(t, newNetwork(t, 3, open))
	third := newGuest(t, newNetwork(t, 4, func(c *network.Config) {
		c.Metadata = []netip.Addr{netip.MustParseAddr(metadataAddr), netip.MustParseAddr(metadataAddr6)}
	}))
	mustReach(t, first, "tcp", second.config.Guest.String(), first.config.Guest.String())
	mustReach(t, first, "udp", second.config.Guest6.String(), first.config.Guest6.String())
	mustNotReach(t, first, "tcp", third.config.Guest.String())
	mustNotReach(t, third, "tcp", first.config.Guest.String())
	mustReach(t, third, "tcp", metadataAddr, hostAddr)
	mustReach(t, third, "tcp", metadataAddr6, hostAddr6)
	mustNotReach(t, third, "tcp", wireAddr)
	mustNotReach(t, first, "tcp", metadataAddr6)
	mustNotReach(t, first, "tcp", metadataAddr)
}

// Forwards take connections and datagrams to the guest from localhost and from outside, by
// ports that nobody else can take.
func TestForward(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	out := newOutside(t)
	n := newNetwork(t, 2, nil)
	g := newGuest(t, n)
	const port = 8007
	at := net.JoinHostPort("0.0.0.0", strconv.Itoa(port))
	listener, err := net.Listen("tcp4", at)
	must(t, err)
	packets, err := net.ListenPacket("udp4", at)
	must(t, err)
	forward := n.Forward(listener, echoPort)
	n.ForwardPackets(packets.(*net.UDPConn), echoPort)
	if _, err := net.Listen("tcp4", at); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("the port can be taken again: %v", err)
	}
	gateway := g.config.Gateway.String()
	for _, protocol := range []string{"tcp", "udp"} {
		for _, from := range []struct {
			place
			addr string
		}{{theHost{}, "127.0.0.1"}, {theHost{}, hostAddr}, {out, hostAddr}} {
			var peer string
			err := from.Do(func() (err error) {
				peer, err = ask(protocol, from.addr, port, patience)
				return err
			})
			if err != nil || peer != gateway {
				t.Errorf("%s by %s: it was asked by %q, %v; want %s", protocol, from.addr, peer, err, gateway)
			}
		}
	}
	if _, err := n.DialGuest(t.Context(), 9); !errors.Is(err, network.ErrRefused) {
		t.Errorf("connect to a port where nothing listens: %v, want %v", err, network.ErrRefused)
	}
	conn, err := n.DialGuest(t.Context(), echoPort)
	must(t, err)
	if usage, err := n.Usage(); usage.Received == 0 || usage.Sent == 0 || err != nil {
		t.Errorf("usage is %+v, %v", usage, err)
	}
	must(t, forward.Close())
	if _, err := ask("tcp", "127.0.0.1", port, impatience); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a forward that was closed: %v", err)
	}
	must(t, n.Close())
	if _, err := io.ReadAll(conn); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a connection stays when the network is closed: %v", err)
	}
	if _, err := n.DialGuest(t.Context(), echoPort); err == nil {
		t.Error("a network that is closed connects")
	}
	mustBeEmpty(t)
}

// mustBeEmpty checks that nothing of any VM is on the host.
func mustBeEmpty(t testing.TB) {
	t.Helper()
	for _, left := range leftOnHost(t) {
		t.Errorf("%s is left", left)
	}
}

// leftOnHost returns the names of what is on the host for VMs.
func leftOnHost(t testing.TB) []string {
	t.Helper()
	var left []string
	links, err := netlink.LinkList()
	must(t, err)
	for _, link := range links {
		if _, ok := parseOwner(link.Attrs().Alias); ok {
			left = append(left, "interface "+link.Attrs().Name)
		}
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := netlink.RuleListFiltered(family, &netlink.Rule{Table: divertTable}, netlink.RT_FILTER_TABLE)
		must(t, err)
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: divertTable}, netlink.RT_FILTER_TABLE)
		must(t, err)
		for _, rule := range rules {
			left = append(left, rule.String())
		}
		for _, route := range routes {
			left = append(left, route.String())
		}
	}
	conn, err := nftables.New()
	must(t, err)
	known, err := look(conn)
	must(t, err)
	for _, c := range known.ours() {
		left = append(left, "chain "+c.Name)
	}
	passages, err := known.passages(conn)
	must(t, err)
	for _, p := range passages {
		for range p.have {
			left = append(left, "a rule in chain "+p.chain.Name+" of table "+p.chain.Table.Name)
		}
	}
	return left
}
