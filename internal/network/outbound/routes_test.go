package outbound

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"go.uber.org/goleak"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testConfig() Config {
	return Config{Inside: []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd00:2::/64")}}
}

func newOutbound(t *testing.T) *Outbound {
	t.Helper()
	o, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		o.Close()
		o.Wait()
	})
	return o
}

// fakeRequest is a connection that the guest asks for, and that is never made.
type fakeRequest struct{ refused bool }

func (r *fakeRequest) Accept() (GuestConn, error) { return nil, net.ErrClosed }
func (r *fakeRequest) Refuse()                    { r.refused = true }

// The host's own addresses are closed however they are its own (S5). Each is set up, and a
// server of the host listens on it.
func TestHostsOwnAddresses(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	nettest.NewOutside(t)
	listener, err := net.Listen("tcp", "[::]:0")
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
	o := newOutbound(t)
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
		{"IPv6 address", "2001:db8:1::7", []string{"addr add 2001:db8:1::7/64 dev host nodad"}},
		{"IPv6 address of every router", "2001:db8:2::", []string{"addr add 2001:db8:2::7/64 dev host nodad"}},
		{"local IPv6 network", "2001:db8:3::77", []string{"route add local 2001:db8:3::/64 dev lo"}},
		{"IPv6 black hole", "2001:db8:4::1", []string{"route add blackhole 2001:db8:4::1/128"}},
		{"IPv4 in IPv6", "::ffff:198.51.100.1", nil},
		{"broadcast route", "203.0.113.4", []string{"route add broadcast 203.0.113.4/32 dev host"}},
		{"black hole", "203.0.113.5", []string{"route add blackhole 203.0.113.5/32"}},
		{"address of an interface that is down", "203.0.113.129", []string{"link add idle type veth peer name idle2", "addr add 203.0.113.129/25 dev idle"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := nettest.RunIP(test.setUp...); err != nil {
				t.Log(err) // not all kernels have all of this
				return
			}
			to := netip.AddrPortFrom(netip.MustParseAddr(test.addr), port)
			for _, protocol := range []smolvm.Protocol{smolvm.TCP, smolvm.UDP} {
				conn, err := o.dial(&network.Flow{Protocol: protocol, To: to})
				if err == nil {
					_ = conn.Close()
				}
				if protocol == smolvm.UDP && test.name == "local route for a protocol" {
					continue
				}
				if !errors.Is(err, ErrRefused) {
					t.Errorf("dial by %s: %v, want %v", protocol, err, ErrRefused)
				}
			}
			request := &fakeRequest{}
			o.Connect(to, request)
			if !request.refused {
				t.Error("the guest is connected to it")
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
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	var server net.PacketConn
	nettest.NewOutside(t).Run(func() (err error) {
		server, err = net.ListenPacket("udp4", nettest.OutsideAddr().String()+":8080")
		return err
	})
	defer func() { _ = server.Close() }()
	o := newOutbound(t)
	what := network.Flow{Protocol: smolvm.UDP, To: netip.AddrPortFrom(nettest.OutsideAddr(), 8080)}
	outside, err := o.dial(&what)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = outside.Close() }()
	f := &flow{outside: outside, of: o, from: addrPort(outside.LocalAddr()), what: what}
	if !f.stillAllowed(nil) {
		t.Fatal("a flow to the outside is not allowed")
	}
	if err := nettest.RunIP("addr add " + nettest.OutsideAddr().String() + "/32 dev lo"); err != nil {
		t.Fatal(err)
	}
	f.checked = f.checked.Add(-flowCheck)
	if f.stillAllowed(nil) {
		t.Error("a flow goes on to an address that is the host's now")
	}
}

// Another VM that has a TAP interface is not reached by the sockets of this one's process, though
// these are the host's, unless the policy names VMs and that one is open.
func TestOtherVMByTAP(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	nettest.NewOutside(t)
	err := nettest.RunIP(
		"link add smol-ac100003 type bridge", "addr add 172.16.0.1/32 dev smol-ac100003", "link set smol-ac100003 up",
		"route add 172.16.0.3/32 dev smol-ac100003 src 172.16.0.1",
	)
	if err != nil {
		t.Fatal(err)
	}
	vm := netip.MustParseAddrPort("172.16.0.3:80")
	atVMs := policytest.PolicyOf(t, network.DefaultAllow, "allow @vms")
	for _, test := range []struct {
		what    string
		policy  network.Policy
		open    func(netip.Addr) bool
		allowed bool
	}{
		{"without a policy", network.Policy{}, nil, false},
		{"by its network", policytest.PolicyOf(t, network.DefaultDeny, "allow 172.16.0.0/16"), nil, false},
		{"by its name, where guests don't reach others", atVMs, nil, false},
		{"by its name, and not open", atVMs, func(netip.Addr) bool { return false }, false},
		{"by its name, and open", atVMs, func(addr netip.Addr) bool { return addr == vm.Addr() }, true},
	} {
		config := testConfig()
		config.MayReachVM, config.Egress = test.open, &network.Egress{Policy: test.policy}
		o, err := New(config)
		if err != nil {
			t.Fatal(err)
		}
		f := network.Flow{Protocol: smolvm.TCP, To: vm}
		if v, err := o.check(&f, netip.AddrPort{}); (err == nil && v.Allowed) != test.allowed {
			t.Errorf("%s: %v, %v; want allowed: %t", test.what, v, err, test.allowed)
		}
		o.Close()
	}
}

// Where the kernel tells nothing of its routes, its interfaces' addresses are closed, and
// where it does not even tell these, everything is.
func TestRoutesUnknown(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	nettest.NewOutside(t)
	if err := nettest.RunIP("addr add 198.51.100.7/24 dev host"); err != nil {
		t.Fatal(err)
	}
	routes := hostRoutes{byInterface: true}
	for addr, refused := range map[string]bool{
		"198.51.100.1": true, "198.51.100.7": true, "198.51.100.0": true, "198.51.100.255": true, "127.0.0.1": true,
		"198.51.100.2": false, "203.0.113.1": false,
	} {
		_, err := routes.check(smolvm.TCP, netip.AddrPort{}, netip.AddrPortFrom(netip.MustParseAddr(addr), 1))
		if errors.Is(err, ErrRefused) != refused {
			t.Errorf("%s: %v, want refused: %t", addr, err, refused)
		}
	}
	if _, err := newHostRoutes(); err != nil {
		t.Errorf("routes of this kernel: %v", err)
	}
}

// What the configuration opens is open, and nothing beside it. What is closed by default is
// in the table of package network.
func TestPolicy(t *testing.T) {
	open := testConfig()
	open.Metadata = []netip.Addr{netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("::ffff:168.63.129.16")}
	for _, test := range []struct {
		addr             string
		allowed, ifNamed bool
	}{
		{"192.0.2.1", true, true},
		{"10.0.3.1", true, true},
		{"10.0.2.2", false, false},
		{"fd00:2::2", false, false},
		{"2001:db8::1", true, true},
		{"::ffff:10.0.2.2", false, false},
		{"127.0.0.1", false, false},
		{"169.254.169.254", false, true},
		{"::ffff:169.254.169.254", false, true},
		{"169.254.170.2", false, false},
		{"168.63.129.16", false, true},
		{"100.100.100.200", false, false},
	} {
		f := network.Flow{Protocol: smolvm.TCP, To: netip.AddrPortFrom(netip.MustParseAddr(test.addr), 80)}
		for _, c := range []struct {
			config Config
			want   bool
		}{{testConfig(), test.allowed}, {open, test.ifNamed}} {
			o := Outbound{config: c.config}
			o.policy.Store(policyOf(c.config.Metadata, network.Policy{}))
			if err := o.judge(f); (err == nil) != c.want || err != nil && !errors.Is(err, ErrRefused) {
				t.Errorf("%s with %v open: %v, want allowed: %t", test.addr, c.config.Metadata, err, c.want)
			}
		}
	}
}

// A rule about the host opens the host's own addresses, and nothing else does: neither its
// port nor its address alone.
func TestHostNamed(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	nettest.NewOutside(t)
	listener, err := net.Listen("tcp4", nettest.HostOutside().String()+":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	to := netip.AddrPortFrom(nettest.HostOutside(), 8080)
	noWay := netip.MustParseAddr("203.0.113.5")
	if err := nettest.RunIP("route add blackhole " + noWay.String() + "/32"); err != nil {
		t.Fatal(err)
	}
	for text, open := range map[string]bool{
		"allow @host:8080": true, "deny *": false, "allow @host:8081": false, "allow *": false, "allow " + nettest.HostOutside().String() + ":8080": false,
	} {
		rule, err := network.ParseRule(text)
		if err != nil {
			t.Fatal(err)
		}
		o := newOutbound(t)
		for revision, otherwise := range []network.Default{network.DefaultDeny, network.DefaultAllow} {
			policy := network.Policy{Default: otherwise, Rules: []network.Rule{rule}}
			if err := o.SetEgress(network.Egress{Revision: int64(revision), Policy: policy}); err != nil {
				t.Fatal(err)
			}
			testHostNamed(t, o, to, text, open)
		}
		// What is closed for another reason than that it is the host's, no rule about that opens.
		testHostNamed(t, o, netip.AddrPortFrom(noWay, 8080), text, false)
	}
}

func testHostNamed(t *testing.T, o *Outbound, to netip.AddrPort, text string, open bool) {
	t.Helper()
	conn, err := o.dial(&network.Flow{Protocol: smolvm.TCP, To: to})
	if (err == nil) != open || err != nil && !errors.Is(err, ErrRefused) {
		t.Errorf("%s to %s: %v, want open: %t", text, to, err, open)
	}
	if err == nil {
		_ = conn.Close()
	}
}

// The metadata services of clouds are closed, though there is a way to them (S6).
func TestMetadataServicesClosed(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	nettest.NewOutside(t)
	if err := nettest.RunIP("route add default via " + nettest.OutsideAddr().String()); err != nil {
		t.Fatal(err)
	}
	o := newOutbound(t)
	for _, addr := range network.MetadataServices() {
		if !addr.Is4() {
			continue
		}
		conn, err := o.dial(&network.Flow{Protocol: smolvm.UDP, To: netip.AddrPortFrom(addr, 80)})
		if !errors.Is(err, ErrRefused) {
			t.Errorf("dial %s: %v, want %v", addr, err, ErrRefused)
		}
		if err == nil {
			_ = conn.Close()
		}
	}
}
