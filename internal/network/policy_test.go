package network

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/smolvm/smolvm"
)

// policyOf makes a policy of the texts of rules.
func policyOf(t testing.TB, otherwise Default, rules ...string) Policy {
	t.Helper()
	p := Policy{Default: otherwise}
	for _, text := range rules {
		rule, err := ParseRule(text)
		if err != nil {
			t.Fatal(err)
		}
		p.Rules = append(p.Rules, rule)
	}
	return p
}

// flowTo is a flow over TCP, unless a protocol is part of the text.
func flowTo(text string, asked ...string) Flow {
	to, protocol, ok := strings.Cut(text, "/")
	if !ok {
		protocol = string(smolvm.TCP)
	}
	f := Flow{Protocol: smolvm.Protocol(protocol), Names: Names{Asked: asked}}
	if addr, err := netip.ParseAddr(to); err == nil {
		f.To = netip.AddrPortFrom(addr, 0)
	} else {
		f.To = netip.MustParseAddrPort(to)
	}
	return f
}

func (f Flow) sni(name string) Flow { f.Names.SNI = name; return f }
func (f Flow) hidden() Flow         { f.Names.Hidden = true; return f }
func (f Flow) toHost() Flow         { f.Host = true; return f }
func (f Flow) toVMs() Flow          { f.VMs = true; return f }

// The policy of a VM for which nothing is asked: what is closed always is, and all else is
// open.
func TestDefaultPolicy(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		flow   Flow
		closed Closed // empty: allowed
	}{
		{flowTo("203.0.113.1:80"), ""},
		{flowTo("203.0.113.1:53/udp"), ""},
		{flowTo("8.8.8.8:443"), ""}, // whoever may go everywhere may ask everybody
		{flowTo("10.0.3.1:80"), ""},
		{flowTo("192.168.1.1:80", "rebinds.example"), ""}, // it can be reached by its address, too
		{flowTo("[2001:db8::1]:80"), ""},
		{flowTo("203.0.113.1"), ""},
		{flowTo("203.0.113.1/icmp"), ""},
		{flowTo("203.0.113.1:80").toHost(), ClosedHost},
		{flowTo("10.0.2.2:80").toVMs(), ClosedVMs},
		{flowTo("0.0.0.0:80"), ClosedNoHost},
		{flowTo("0.1.2.3:80"), ClosedNoHost},
		{flowTo("127.0.0.1:80"), ClosedNoHost},
		{flowTo("127.1.2.3:80"), ClosedNoHost},
		{flowTo("[::ffff:127.0.0.1]:80"), ClosedNoHost},
		{flowTo("[::1]:80"), ClosedNoHost},
		{flowTo("[::]:80"), ClosedNoHost},
		{flowTo("224.0.0.1:80/udp"), ClosedNoHost},
		{flowTo("255.255.255.255:80/udp"), ClosedNoHost},
		{flowTo("[ff02::1]:80/udp"), ClosedNoHost},
		{flowTo("[64:ff9b::7f00:1]:80"), ClosedNoHost}, // NAT64 of 127.0.0.1
		{flowTo("169.254.169.254:80"), ClosedLinkLocal},
		{flowTo("169.254.169.254:80", "good.example").sni("good.example"), ClosedLinkLocal},
		{flowTo("[::ffff:169.254.169.254]:80"), ClosedLinkLocal},
		{flowTo("169.254.170.2:80"), ClosedLinkLocal},
		{flowTo("[fe80::1%eth0]:80"), ClosedLinkLocal},
		{flowTo("[64:ff9b::a9fe:a9fe]:80"), ClosedLinkLocal},
		{flowTo("[2002:a9fe:a9fe::1]:80"), ClosedLinkLocal}, // 6to4
		{flowTo("168.63.129.16:80"), ClosedMetadata},
		{flowTo("100.100.100.200:80"), ClosedMetadata},
		{flowTo("192.0.0.192:80"), ClosedMetadata},
		{flowTo("[fd00:ec2::254]:80"), ClosedMetadata},
		{flowTo("[fd20:ce::254]:80"), ClosedMetadata},
		{Flow{Protocol: smolvm.TCP}, ClosedNoHost}, // no address at all
	} {
		got := Policy{}.Verdict(test.flow)
		if got.Allowed != (test.closed == "") || got.Closed != test.closed || got.Number != 0 || got.Provisional {
			t.Errorf("%+v: %+v, want closed %q", test.flow, got, test.closed)
		}
	}
	for _, name := range []string{"example.com", "dns.google", "1.2.0.192.in-addr.arpa", ""} {
		if got := (Policy{}).Question(name); !got.Allowed {
			t.Errorf("question for %q: %v", name, got)
		}
	}
}

// A verdict on a flow whose names are not known yet reports whether they could change it.
func TestProvisional(t *testing.T) {
	t.Parallel()
	const addr = "203.0.113.1:443"
	for _, test := range []struct {
		policy Policy
		flow   Flow
		want   bool
	}{
		{policyOf(t, DefaultAllow), flowTo(addr), false},
		{policyOf(t, DefaultAllow, "deny 198.51.100.0/24"), flowTo(addr), false},
		{policyOf(t, DefaultAllow, "deny bad.example"), flowTo(addr), true},
		{policyOf(t, DefaultAllow, "deny bad.example:80"), flowTo(addr), false},
		{policyOf(t, DefaultAllow, "deny bad.example"), flowTo(addr).sni("good.example"), false},
		{policyOf(t, DefaultAllow, "deny bad.example"), flowTo(addr).hidden(), false},
		{policyOf(t, DefaultAllow, "deny bad.example"), flowTo("203.0.113.1/icmp"), false},
		{policyOf(t, DefaultDeny, "allow good.example"), flowTo(addr), false}, // no name can prove itself
		{policyOf(t, DefaultDeny, "allow good.example"), flowTo(addr, "good.example"), true},
		{policyOf(t, DefaultDeny, "deny bad.example", "allow good.example"), flowTo(addr, "good.example", "bad.example"), true},
		{policyOf(t, DefaultDeny, "allow 203.0.113.0/24", "allow good.example"), flowTo(addr, "good.example"), false},
		{policyOf(t, DefaultDeny, "allow good.example"), flowTo("169.254.169.254:80", "good.example"), false},
	} {
		if got := test.policy.Verdict(test.flow); got.Provisional != test.want {
			t.Errorf("%v of %+v: %+v, want provisional %t", test.policy, test.flow, got, test.want)
		}
	}
}

func TestQuestion(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		policy  Policy
		name    string
		allowed bool
	}{
		{policyOf(t, DefaultDeny), "good.example", false},
		{policyOf(t, DefaultDeny, "allow good.example:443"), "good.example", true},
		{policyOf(t, DefaultDeny, "allow good.example:443"), "GOOD.example.", true},
		{policyOf(t, DefaultDeny, "allow good.example"), "data.good.example", false}, // no way out by questions
		{policyOf(t, DefaultDeny, "allow *.good.example"), "www.good.example", true},
		{policyOf(t, DefaultDeny, "allow 203.0.113.0/24", "allow @host"), "good.example", false},
		{policyOf(t, DefaultDeny, "allow *:443"), "good.example", true},
		{policyOf(t, DefaultDeny, "deny bad.example", "allow *"), "bad.example", false},
		{policyOf(t, DefaultDeny, "allow *:53"), "dns.google", false},
		{policyOf(t, DefaultDNSOnly), "good.example", true},
		{policyOf(t, DefaultDNSOnly), "dns.google", false},
		{policyOf(t, DefaultDNSOnly, "allow dns.google"), "dns.google", true},
		{policyOf(t, DefaultAllow, "deny bad.example"), "bad.example", false},
		{policyOf(t, DefaultAllow, "deny bad.example:22"), "bad.example", true},
		{policyOf(t, DefaultAllow, "deny bad.example/udp"), "bad.example", true},
		{policyOf(t, DefaultAllow, "deny *"), "good.example", false},
	} {
		if got := test.policy.Question(test.name); got.Allowed != test.allowed {
			t.Errorf("%v: question for %q: %v, want allowed %t", test.policy, test.name, got, test.allowed)
		}
	}
}

func TestVerdictText(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		policy Policy
		flow   Flow
		want   string
	}{
		{policyOf(t, DefaultAllow), flowTo("203.0.113.1:80"), "allowed by default"},
		{policyOf(t, DefaultDeny, "allow *:443"), flowTo("203.0.113.1:80"), "denied by default"},
		{policyOf(t, DefaultDeny, "allow *:443", "allow 203.0.113.0/24:80/tcp"), flowTo("203.0.113.1:80"), "allowed by rule 2: allow 203.0.113.0/24:80/tcp"},
		{policyOf(t, DefaultAllow), flowTo("169.254.169.254:80"), "denied: it is on the host's own link, where clouds have their metadata"},
		{policyOf(t, DefaultAllow), flowTo("203.0.113.1:80").toHost(), "denied: it is the host's own"},
	} {
		if got := test.policy.Verdict(test.flow).String(); got != test.want {
			t.Errorf("%v of %+v: %q, want %q", test.policy, test.flow, got, test.want)
		}
	}
	for _, c := range []Closed{ClosedNoHost, ClosedHost, ClosedVMs, ClosedLinkLocal, ClosedMetadata, ClosedForeignDNS} {
		if why := c.why(); why == "" || why == string(c) {
			t.Errorf("%s is not explained", c)
		}
	}
}

func TestPolicyJSON(t *testing.T) {
	t.Parallel()
	p := policyOf(t, DefaultDNSOnly, "allow example.com:443/tcp", "deny [2001:db8::/32]", "allow @host:8000-8010")
	text, err := json.Marshal(p)
	const want = `{"default":"dns-only","rules":["allow example.com:443/tcp","deny [2001:db8::/32]","allow @host:8000-8010"]}`
	if err != nil || string(text) != want {
		t.Errorf("%s, %v; want %s", text, err, want)
	}
	var read Policy
	if err := json.Unmarshal(text, &read); err != nil || !read.Within(p) || !p.Within(read) || len(read.Rules) != len(p.Rules) {
		t.Errorf("%+v, %v; want %+v", read, err, p)
	}
	if text, err := json.Marshal(Policy{}); err != nil || string(text) != "{}" {
		t.Errorf("the default policy is %s, %v", text, err)
	}
	for text, want := range map[string]string{
		`{"default":"open"}`:             `default "open" of a policy is not known; use allow, deny or dns-only`,
		`{"rules":["allow"]}`:            `rule "allow"`,
		`{"rules":[], "except":["all"]}`: `unknown field "except"`,
		`{"rules":[` + strings.Repeat(`"deny *",`, MaxRules) + `"deny *"]}`: "at most 1000",
	} {
		if err := json.Unmarshal([]byte(text), &read); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: %v, want %q in it", text, err, want)
		}
	}
	for _, r := range []Rule{{}, {Action: Allow, Domain: "two words"}, {Action: Deny, Domain: "example.com", Place: PlaceHost}} {
		if text, err := json.Marshal(r); err == nil {
			t.Errorf("%+v is written as %s", r, text)
		}
	}
}

// The networks that are closed always are those that every verdict calls closed, and none of
// them is in another.
func TestClosedNetworks(t *testing.T) {
	t.Parallel()
	networks := ClosedNetworks()
	isIn := func(addr netip.Addr) bool {
		return slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(addr) })
	}
	for i, p := range networks {
		if p != p.Masked() {
			t.Errorf("%s has bits beyond its length", p)
		}
		for _, q := range networks[:i] {
			if p.Overlaps(q) {
				t.Errorf("%s overlaps %s", p, q)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		// Half of the addresses are near the edges of these networks.
		addr := netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "IPv4")))
		if rapid.Bool().Draw(t, "IPv6") {
			addr = netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "IPv6 address")))
		}
		if rapid.Bool().Draw(t, "edge") {
			addr = rapid.SampledFrom(networks).Draw(t, "network").Addr()
			if rapid.Bool().Draw(t, "before") && addr.Prev().IsValid() {
				addr = addr.Prev()
			}
		}
		if addr.Is4In6() {
			return // a verdict takes it for one of IPv4, and no kernel sends it anywhere
		}
		v := Policy{}.Verdict(Flow{Protocol: smolvm.TCP, To: netip.AddrPortFrom(addr, 1)})
		if v.Allowed == isIn(addr) {
			t.Fatalf("%s is in a closed network: %t; verdict: %s", addr, isIn(addr), v)
		}
	})
}
