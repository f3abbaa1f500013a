// Package policytest has the cases that a policy decides: one table, for the pure verdict and
// for each way to connect a guest.
package policytest

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// Case is a flow under a policy.
type Case struct {
	Name   string
	Policy network.Policy
	Flow   Flow
	// Allowed is what the verdict must be, and By the number of the rule that decides; 0:
	// what is closed always, or the default.
	Allowed bool
	By      int
}

// Flow is a flow as the policy is told it, and what came before.
type Flow struct {
	network.Flow
	// Expired are the names for which the guest was told the address, too long ago.
	Expired []string
}

// flowTo is a flow over TCP, unless a protocol is part of the text.
func flowTo(text string, asked ...string) Flow {
	to, protocol, ok := strings.Cut(text, "/")
	if !ok {
		protocol = string(smolvm.TCP)
	}
	f := network.Flow{Protocol: smolvm.Protocol(protocol), Names: network.Names{Asked: asked}}
	if addr, err := netip.ParseAddr(to); err == nil {
		f.To = netip.AddrPortFrom(addr, 0)
	} else {
		f.To = netip.MustParseAddrPort(to)
	}
	return Flow{Flow: f}
}

func anyTo(text string) Flow {
	return Flow{Flow: network.Flow{To: netip.MustParseAddrPort(text)}}
}

func (f Flow) sni(name string) Flow     { f.Names.SNI = name; return f }
func (f Flow) host(name string) Flow    { f.Names.Host = name; return f }
func (f Flow) hidden() Flow             { f.Names.Hidden = true; return f }
func (f Flow) toHost() Flow             { f.Host = true; return f }
func (f Flow) toVMs() Flow              { f.VMs = true; return f }
func (f Flow) expired(name string) Flow { f.Expired = append(f.Expired, name); return f }

// PolicyOf makes a policy of the texts of rules.
func PolicyOf(t testing.TB, otherwise network.Default, rules ...string) network.Policy {
	t.Helper()
	p := network.Policy{Default: otherwise}
	for _, text := range rules {
		rule, err := network.ParseRule(text)
		if err != nil {
			t.Fatal(err)
		}
		p.Rules = append(p.Rules, rule)
	}
	return p
}

// Cases returns all of them.
func Cases(t testing.TB) []Case {
	t.Helper()
	const addr, other = "203.0.113.1:443", "203.0.113.2:443"
	denies := func(rules ...string) network.Policy { return PolicyOf(t, network.DefaultDeny, rules...) }
	allows := func(rules ...string) network.Policy { return PolicyOf(t, network.DefaultAllow, rules...) }
	dnsOnly := func(rules ...string) network.Policy { return PolicyOf(t, network.DefaultDNSOnly, rules...) }
	byName := denies("allow good.example")
	return []Case{
		{"name that was asked and is stated", byName, flowTo(addr, "good.example").sni("good.example"), true, 1},
		{"name that was asked, nothing stated", byName, flowTo(addr, "good.example"), true, 1},
		{"name in other letters", byName, flowTo(addr, "Good.Example.").sni("GOOD.example"), true, 1},
		{"a look-alike is another name", denies("allow k.example"), flowTo(addr, "\u212a.example"), false, 0},
		{"Host with a port", byName, flowTo("203.0.113.1:8080", "good.example").host("good.example:8080"), true, 1},
		{"TLS without SNI", byName, flowTo(addr, "good.example").hidden(), false, 0},
		{"SNI without Host", byName, flowTo("203.0.113.1:8443", "good.example").sni("good.example"), true, 1},
		{"HTTP without TLS", byName, flowTo("203.0.113.1:80", "good.example").host("good.example"), true, 1},
		{"datagrams by name", byName, flowTo("203.0.113.1:4000/udp", "good.example"), true, 1},
		{"datagrams to a raw address", byName, flowTo("203.0.113.1:4000/udp"), false, 0},
		{"datagrams that are allowed by address", denies("allow 203.0.113.1:4000/udp"), flowTo("203.0.113.1:4000/udp"), true, 1},
		{"QUIC at another port", byName, flowTo("203.0.113.1:4433/udp", "good.example").hidden(), false, 0},
		{"raw address", byName, flowTo(addr), false, 0},
		{"answer that is no longer valid", byName, flowTo(addr).expired("good.example").sni("good.example"), false, 0},
		{"answer that is no longer valid, nothing stated", byName, flowTo(addr).expired("good.example"), false, 0},
		{"forged SNI", byName, flowTo(other, "bad.example").sni("good.example"), false, 0},
		{"forged Host", byName, flowTo(other, "bad.example").host("good.example"), false, 0},
		{"SNI of the address, Host of another", byName, flowTo(addr, "good.example").sni("good.example").host("bad.example"), false, 0},
		{"Host of the address, SNI of another", byName, flowTo(addr, "good.example").sni("bad.example").host("good.example"), false, 0},
		{"another name of a shared address", byName, flowTo(addr, "good.example", "bad.example").sni("bad.example"), false, 0},
		{"the name of a shared address", byName, flowTo(addr, "good.example", "bad.example").sni("good.example"), true, 1},
		{"two names, each allowed", denies("allow good.example", "allow fine.example"),
			flowTo(addr, "good.example", "fine.example").sni("good.example").host("fine.example"), true, 1},
		{"hidden name", byName, flowTo("203.0.113.1:443/udp", "good.example").hidden(), false, 0},
		{"hidden name, allowed by address", denies("allow 203.0.113.0/24"), flowTo("203.0.113.1:443/udp", "good.example").hidden(), true, 1},
		{"hidden name, others denied", allows("deny bad.example"), flowTo("203.0.113.1:443/udp", "good.example").hidden(), false, 1},
		{"hidden name, allowed before", allows("allow 203.0.113.0/24", "deny bad.example"), flowTo("203.0.113.1:443/udp").hidden(), true, 1},
		{"hidden name, others denied elsewhere", allows("deny bad.example/tcp"), flowTo("203.0.113.1:443/udp").hidden(), true, 0},
		{"empty names are none", byName, flowTo(addr, "", "."), false, 0},
		{"name below", byName, flowTo(addr, "www.good.example"), false, 0},
		{"name that ends alike", byName, flowTo(addr, "notgood.example"), false, 0},

		{"rebind to a private address", byName, flowTo("192.168.1.1:443", "good.example").sni("good.example"), false, 0},
		{"rebind to a carrier's address", byName, flowTo("100.64.0.1:443", "good.example"), false, 0},
		{"rebind by IPv6", byName, flowTo("[fd00::1]:443", "good.example"), false, 0},
		{"rebind by NAT64", byName, flowTo("[64:ff9b::c0a8:101]:443", "good.example"), false, 0},
		{"rebind by mapped IPv4", byName, flowTo("[::ffff:192.168.1.1]:443", "good.example"), false, 0},
		{"rebind to loopback", byName, flowTo("127.0.0.1:443", "good.example"), false, 0},
		{"rebind to metadata", byName, flowTo("169.254.169.254:443", "good.example").host("good.example"), false, 0},
		{"rebind to the host", byName, flowTo(addr, "good.example").sni("good.example").toHost(), false, 0},
		{"private address that is named", denies("allow 192.168.1.0/24"), flowTo("192.168.1.1:443", "good.example"), true, 1},
		{"mapped IPv4 address that is named", denies("allow 192.168.1.0/24"), flowTo("[::ffff:192.168.1.1]:443"), true, 1},
		{"mapped IPv4 address that is denied", allows("deny 192.168.1.0/24"), flowTo("[::ffff:192.168.1.1]:443"), false, 1},

		{"wildcard: name below", denies("allow *.good.example"), flowTo(addr, "a.b.good.example"), true, 1},
		{"wildcard: the name itself", denies("allow *.good.example"), flowTo(addr, "good.example"), false, 0},
		{"wildcard: name that ends alike", denies("allow *.good.example"), flowTo(addr, "a.notgood.example"), false, 0},
		{"port", denies("allow good.example:443"), flowTo(addr, "good.example"), true, 1},
		{"other port", denies("allow good.example:443"), flowTo("203.0.113.1:22", "good.example"), false, 0},
		{"first of a range", denies("allow *:8000-8002"), flowTo("203.0.113.1:8000"), true, 1},
		{"last of a range", denies("allow *:8000-8002"), flowTo("203.0.113.1:8002"), true, 1},
		{"behind a range", denies("allow *:8000-8002"), flowTo("203.0.113.1:8003"), false, 0},
		{"protocol", denies("allow *:443/tcp"), flowTo(addr), true, 1},
		{"other protocol", denies("allow *:443/tcp"), flowTo("203.0.113.1:443/udp"), false, 0},
		{"ICMP", denies("allow */icmp"), flowTo("203.0.113.1/icmp"), true, 1},
		{"ICMP has no ports", denies("allow *:1-65535"), flowTo("203.0.113.1/icmp"), false, 0},
		{"last address of a network", denies("allow 203.0.113.0/31"), flowTo(addr), true, 1},
		{"address behind a network", denies("allow 203.0.113.0/31"), flowTo(other), false, 0},
		{"IPv6 network", denies("allow [2001:db8::/32]:443"), flowTo("[2001:db8:1::1]:443"), true, 1},
		{"IPv6 by name", byName, flowTo("[2001:db8:1::1]:443", "good.example").sni("good.example"), true, 1},
		{"IPv6, forged SNI", byName, flowTo("[2001:db8:1::1]:443", "bad.example").sni("good.example"), false, 0},
		{"IPv6 raw", byName, flowTo("[2001:db8:1::1]:443"), false, 0},
		{"IPv6, answer that is no longer valid", byName, flowTo("[2001:db8:1::1]:443").expired("good.example").sni("good.example"), false, 0},
		{"IPv6, hidden name", byName, flowTo("[2001:db8:1::1]:443/udp", "good.example").hidden(), false, 0},
		{"IPv6, datagrams by name", byName, flowTo("[2001:db8:1::1]:4000/udp", "good.example"), true, 1},
		{"IPv6, foreign resolver", denies("allow *"), flowTo("[2001:db8:1::1]:53/udp"), false, 0},
		{"IPv6, rebind to metadata", byName, flowTo("[fd00:ec2::254]:80", "good.example"), false, 0},
		{"IPv6, the host", allows("allow [2001:db8:1::1]"), flowTo("[2001:db8:1::1]:443").toHost(), false, 0},
		{"IPv6, the host by its name", denies("allow @host:443"), flowTo("[2001:db8:1::1]:443").toHost(), true, 1},

		{"first match denies", denies("deny bad.example", "allow *"), flowTo(addr, "bad.example"), false, 1},
		{"first match allows", denies("allow bad.example:443", "deny bad.example"), flowTo(addr, "bad.example"), true, 1},
		{"second rule", allows("deny bad.example", "deny 203.0.113.0/24"), flowTo(addr, "good.example"), false, 2},
		{"denied name that is stated only", allows("deny bad.example"), flowTo(addr).sni("bad.example"), false, 1},
		{"denied name behind a forged one", allows("deny bad.example:22"), flowTo("203.0.113.1:22", "bad.example").sni("good.example"), false, 1},
		{"not denied", allows("deny bad.example"), flowTo(addr, "good.example").sni("good.example"), true, 0},
		{"DNS only", dnsOnly(), flowTo(addr, "good.example"), false, 0},
		{"DNS only, and a rule", dnsOnly("allow good.example"), flowTo(addr, "good.example"), true, 1},

		{"everything is not what is closed", denies("allow *"), flowTo("169.254.169.254:80"), false, 0},
		{"nor is a network around it", denies("allow 169.0.0.0/8"), flowTo("169.254.169.254:80"), false, 0},
		{"link-local address that is named", denies("allow 169.254.169.254:80"), flowTo("169.254.169.254:80"), true, 1},
		{"another one beside it", denies("allow 169.254.169.254:80"), flowTo("169.254.170.2:80"), false, 0},
		{"link-local network that is named", allows("allow 169.254.0.0/16"), flowTo("169.254.170.2:80"), true, 1},
		{"metadata by a network", allows("allow 168.63.129.0/24"), flowTo("168.63.129.16:80"), false, 0},
		{"metadata by a network that begins there", allows("allow 168.63.129.16/28"), flowTo("168.63.129.16:80"), false, 0},
		{"metadata by its address", allows("allow 168.63.129.16"), flowTo("168.63.129.16:80"), true, 1},
		{"metadata that is denied first", allows("deny *:80", "allow 168.63.129.16"), flowTo("168.63.129.16:80"), false, 1},
		{"host by an address", allows("allow 203.0.113.1"), flowTo(addr).toHost(), false, 0},
		{"host by its name", allows("allow @host:443/tcp"), flowTo(addr).toHost(), true, 1},
		{"host by its name, other port", allows("allow @host:443/tcp"), flowTo("203.0.113.1:22").toHost(), false, 0},
		{"the host is no other", denies("allow @host"), flowTo(addr), false, 0},
		{"metadata that the host has", allows("allow 169.254.169.254"), flowTo("169.254.169.254:80").toHost(), false, 0},
		{"VMs by their network", allows("allow 172.16.0.0/16"), flowTo("172.16.0.3:80").toVMs(), false, 0},
		{"VMs by their name", allows("allow @vms:80"), flowTo("172.16.0.3:80").toVMs(), true, 1},
		{"loopback stays closed", allows("allow 127.0.0.1", "allow @host"), flowTo("127.0.0.1:80"), false, 0},
		{"multicast stays closed", allows("allow 224.0.0.0/4"), flowTo("224.0.0.1:80/udp"), false, 0},

		{"foreign resolver", denies("allow *"), flowTo("203.0.113.1:53/udp"), false, 0},
		{"foreign resolver by TCP", denies("allow 203.0.113.0/24"), flowTo("203.0.113.1:53"), false, 0},
		{"foreign resolver by TLS", denies("allow *"), flowTo("203.0.113.1:853"), false, 0},
		{"foreign resolver by QUIC", denies("allow *"), flowTo("203.0.113.1:853/udp"), false, 0},
		{"foreign resolver, names denied", allows("deny bad.example"), flowTo("203.0.113.1:53/udp"), false, 0},
		{"foreign resolver, addresses denied", allows("deny 198.51.100.0/24"), flowTo("203.0.113.1:53/udp"), true, 0},
		{"foreign resolver that is named", denies("allow 203.0.113.1:53"), flowTo("203.0.113.1:53/udp"), true, 1},
		{"foreign resolver by a range of ports", denies("allow *:1-1024"), flowTo("203.0.113.1:53/udp"), false, 0},
		{"DNS over HTTPS by name", denies("allow *"), flowTo(addr, "dns.google").sni("dns.google"), false, 0},
		{"DNS over HTTPS by wildcard", denies("allow *.google"), flowTo(addr, "dns.google"), false, 0},
		{"DNS over HTTPS by Host", denies("allow *"), flowTo(addr, "good.example").sni("good.example").host("dns.google"), false, 0},
		{"DNS over HTTPS by address", denies("allow *"), flowTo("1.1.1.1:443"), false, 0},
		{"DNS over HTTPS that is named", denies("allow dns.google"), flowTo(addr, "dns.google").sni("dns.google"), true, 1},
		{"DNS over HTTPS whose address is named", denies("allow 1.1.1.1:443"), flowTo("1.1.1.1:443"), true, 1},
		{"resolver's web page", denies("allow 1.1.1.0/24:80"), flowTo("1.1.1.1:80"), true, 1},

		{"some port may be allowed", denies("allow 203.0.113.1:80/tcp"), anyTo("203.0.113.1:0"), true, 1},
		{"not all ports are denied", allows("deny 203.0.113.1:80", "deny 203.0.113.1/udp"), anyTo("203.0.113.1:0"), true, 0},
		{"all ports are denied", allows("deny 203.0.113.1"), anyTo("203.0.113.1:0"), false, 1},
	}
}
