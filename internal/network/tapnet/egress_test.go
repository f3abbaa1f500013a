package tapnet

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

// withPolicy gives a VM a policy.
func withPolicy(t testing.TB, otherwise network.Default, rules ...string) func(*network.Config) {
	policy := policytest.PolicyOf(t, otherwise, rules...)
	return func(c *network.Config) { c.Egress = &network.Egress{Revision: 1, Policy: policy} }
}

// onlyFar lets a guest out to farAddr and farAddr6 alone.
func onlyFar(t testing.TB) func(*network.Config) {
	return withPolicy(t, network.DefaultDeny, "allow "+farAddr, "allow ["+farAddr6+"]")
}

// mustReachFarOnly checks that a guest with onlyFar gets there, and nowhere else.
func mustReachFarOnly(t testing.TB, g guest) {
	t.Helper()
	for _, protocol := range []string{"tcp", "udp"} {
		mustReach(t, g, protocol, farAddr, hostAddr)
		mustReach(t, g, protocol, farAddr6, hostAddr6)
		for _, addr := range []string{outsideAddr, outsideAddr6, hostAddr, hostAddr6, wireAddr, metadataAddr6, strayAddr} {
			mustNotReach(t, g, protocol, addr)
		}
	}
	for _, addr := range []string{farAddr, farAddr6, outsideAddr} {
		if ping(g, addr, impatience) {
			t.Errorf("%s answers a ping", addr)
		}
	}
}

// A policy narrows what a guest reaches, beside all firewalls that there are, and nothing of it
// stays on the host.
func TestPolicyBesideOthers(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	walls := append(firewalls(), firewall{name: "one that compares packets with routes", chain: func(conn *nftables.Conn) []*nftables.Chain {
		// As firewalld does it (IPv6_rpfilter).
		c := conn.AddChain(&nftables.Chain{
			Name: "filter_PREROUTING", Table: foreignTable(conn, "firewalld", nftables.TableFamilyINet), Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRef(10),
		})
		fib := &expr.Fib{Register: first, ResultOIF: true, FlagSADDR: true, FlagMARK: true, FlagIIF: true, FlagPRESENT: true}
		addRule(conn, c, ipv6().icmpType(134, 136), accept())
		addRule(conn, c, match{fib, compare(expr.CmpOpEq, []byte{0})}, drop())
		return nil
	}})
	for _, wall := range walls {
		t.Run(wall.name, func(t *testing.T) {
			conn, err := nftables.New()
			must(t, err)
			conn.FlushRuleset()
			wall.chain(conn)
			must(t, conn.Flush())
			n := newNetwork(t, 2, onlyFar(t))
			if err := n.Problem(); err != nil {
				t.Error(err)
			}
			g := newGuest(t, n)
			mustReachFarOnly(t, g)
			mustReach(t, theHost{}, "tcp", g.config.Guest.String(), g.config.Gateway.String())
			mustReach(t, theHost{}, "udp", g.config.Guest6.String(), g.config.Gateway6.String())
			must(t, n.Close())
			mustBeEmpty(t)
		})
	}
}

// The way back to a guest is its interface, though packets that the shim takes are marked and the
// host looks at marks.
func TestPolicyWhereMarksChooseRoutes(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	must(t, setSysctl("ipv4/conf/all/src_valid_mark", "1"))
	g := newGuest(t, newNetwork(t, 2, onlyFar(t)))
	mustReachFarOnly(t, g)
}

// A guest whose shim was killed gets nowhere.
func TestPolicyOfDeadShim(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	n := newNetwork(t, 2, onlyFar(t))
	g := newGuest(t, n)
	conn, err := g.dialer("tcp")(netip.MustParseAddrPort(farAddr + ":7"))
	must(t, err)
	defer func() { _ = conn.Close() }()
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
	// Its sockets are gone, and what is on the host stays.
	n.endNames()
	n.endFlows()
	for _, protocol := range []string{"tcp", "udp"} {
		for _, addr := range []string{farAddr, farAddr6, outsideAddr, hostAddr, g.config.Gateway.String()} {
			mustNotReach(t, g, protocol, addr)
		}
	}
	if ping(g, farAddr, impatience) {
		t.Errorf("%s answers a ping", farAddr)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a connection is not broken off")
	}
	mustReach(t, theHost{}, "tcp", farAddr, hostAddr)
	must(t, n.Close())
	mustBeEmpty(t)
}

// What the kernel has forwarded for a guest without a policy ends when it gets one, both ways,
// and what others have with the guest goes on. When the policy is taken away, what the shim
// carries goes on, and all is open again.
func TestFirstPolicy(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, n, g := newPolicyWorld(t, policytest.FlowPorts())
	raw, datagramsTo := netip.MustParseAddrPort("203.0.113.3:8080"), netip.MustParseAddrPort("203.0.113.3:4000")
	before := w.Open(raw, []byte("\x00first"))
	idle := w.Open(raw, nil)
	datagrams := w.SendFirst(datagramsTo)
	if got := flowsFrom(t, g.config.Guest); got == 0 {
		t.Error("the kernel knows no connection of the guest")
	}
	must(t, g.Do(func() error { return serveEcho(t, g.config.Guest.String()) }))
	fromHost, err := n.DialGuest(t.Context(), echoPort)
	must(t, err)
	defer func() { _ = fromHost.Close() }()
	must(t, peek(fromHost))

	w.Set(policytest.PolicyOf(t, network.DefaultDeny, "allow 203.0.113.3"))
	if got := flowsFrom(t, g.config.Guest); got != 0 {
		t.Errorf("the kernel knows %d connections of the guest still", got)
	}
	for name, conn := range map[string]net.Conn{"an address": before, "an address, idle": idle} {
		if _, err := conn.Write([]byte("x")); err == nil {
			w.MustEnd(name, conn)
		}
	}
	carried := w.Open(raw, []byte("\x00first"))
	if _, err := datagrams.Write([]byte("again")); err != nil {
		t.Error(err)
	}
	if got := w.Arrived(); got != "again" { // by the shim
		t.Errorf("%q arrives", got)
	}
	if got := flowsFrom(t, g.config.Guest); got != 0 {
		t.Errorf("the kernel tracks %d connections that the shim carries", got)
	}
	if _, err := fromHost.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
	must(t, peek(fromHost))

	w.Set(policytest.PolicyOf(t, network.DefaultDeny))
	w.MustEnd("what is not allowed any more", carried)
	w.MustBeRefused(datagrams)
	w.Set(policytest.PolicyOf(t, network.DefaultDeny, "allow 203.0.113.3"))
	carried = w.Open(raw, []byte("\x00first"))
	if ping(g, "203.0.113.3", impatience) {
		t.Error("pings get out")
	}
	w.Set(network.Policy{})
	w.MustGoOn(carried)
	w.Open(netip.MustParseAddrPort("203.0.113.9:8080"), []byte("\x00first"))
	if !ping(g, "203.0.113.9", patience) {
		t.Error("pings don't get out without a policy")
	}
	w.Set(policytest.PolicyOf(t, network.DefaultDeny))
	w.MustEnd("what is not allowed any more", carried)
	if ping(g, "203.0.113.9", impatience) {
		t.Error("pings get out")
	}
	must(t, n.Close())
	if err := n.SetEgress(network.Egress{Revision: 100}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a policy of a network that is closed: %v", err)
	}
}

// peek reads a byte of a connection.
func peek(conn net.Conn) error {
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	_, err := conn.Read(make([]byte, 1))
	return err
}

// flowsFrom returns how many connections from an address the kernel knows, but for questions for
// names.
func flowsFrom(t testing.TB, addr netip.Addr) (known int) {
	t.Helper()
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	must(t, err)
	for _, flow := range flows {
		if from, ok := netip.AddrFromSlice(flow.Forward.SrcIP); ok && from.Unmap() == addr && flow.Forward.DstPort != dnsPort {
			known++
		}
	}
	return known
}

// All datagrams of a flow get out, those too that come before it has a socket of its own.
func TestEarlyDatagrams(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, _, _ := newPolicyWorld(t, policytest.FlowPorts())
	w.Set(policytest.PolicyOf(t, network.DefaultDeny, "allow 203.0.113.3", "allow [2001:db8:7::3]"))
	for _, to := range []string{"203.0.113.3:4000", "[2001:db8:7::3]:4000"} {
		for range 20 {
			conn, err := w.DialUDP(netip.MustParseAddrPort(to))
			must(t, err)
			texts := []string{"first", "second", "third", "fourth"}
			for _, text := range texts {
				if _, err := conn.Write([]byte(text)); err != nil {
					t.Fatal(err)
				}
			}
			var got []string
			for range texts {
				got = append(got, w.Arrived())
			}
			slices.Sort(got)
			slices.Sort(texts)
			if !slices.Equal(got, texts) {
				t.Errorf("%q arrive, want %q", got, texts)
			}
			_ = conn.Close()
		}
	}
}

// A flow of datagrams to a port that a program of the host has at all addresses can't have its
// own socket there, and the guest is told.
func TestPortOfHostForDatagrams(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, _, _ := newPolicyWorld(t, policytest.FlowPorts())
	w.Set(policytest.PolicyOf(t, network.DefaultDeny, "allow 203.0.113.3"))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer func() { _ = unix.Close(fd) }()
	must(t, unix.Bind(fd, &unix.SockaddrInet4{Port: 4000}))
	conn, err := w.DialUDP(netip.MustParseAddrPort("203.0.113.3:4000"))
	must(t, err)
	defer func() { _ = conn.Close() }()
	w.MustBeRefused(conn)
}

// A guest has no more connections than it may have, and what it opens beyond is broken off.
func TestTooManyCarried(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w, n, g := newPolicyWorld(t, policytest.FlowPorts())
	w.Set(policytest.PolicyOf(t, network.DefaultDeny, "allow 203.0.113.3"))
	for range maxConns - 1 { // as many as there may be, and one
		n.carrier.slots <- struct{}{}
	}
	to := netip.MustParseAddrPort("203.0.113.3:8080")
	last := w.Open(to, []byte("\x00first"))
	if conn, err := g.dialer("tcp")(to); err == nil {
		w.MustEnd("one too many", conn)
	}
	w.MustGoOn(last)
}

// On a bridge there are no policies.
func TestNoPolicyOnBridge(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br-lan"}}))
	at, err := network.Plan(network.Bridge, 2)
	must(t, err)
	config := at.Config()
	config.Bridge = "br-lan"
	owner, err := OwnedBy("data", "vm2")
	must(t, err)
	restricted := config
	withPolicy(t, network.DefaultDeny)(&restricted)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err = New(ctx, restricted, owner)
	mustFail(t, err, `there are no egress policies in network mode "bridge"`, true)
	mustBeEmpty(t)
	n, err := New(ctx, config, owner)
	must(t, err)
	mustFail(t, n.SetEgress(network.Egress{Revision: 1}), `there are no egress policies in network mode "bridge"`, true)
	if got := n.EgressRevision(); got != 0 {
		t.Errorf("revision %d", got)
	}
	must(t, n.Close())
}
