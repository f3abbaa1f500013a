package network

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/smolvm/smolvm"
)

func TestWithin(t *testing.T) {
	t.Parallel()
	denies := func(rules ...string) Policy { return policyOf(t, DefaultDeny, rules...) }
	allows := func(rules ...string) Policy { return policyOf(t, DefaultAllow, rules...) }
	dnsOnly := func(rules ...string) Policy { return policyOf(t, DefaultDNSOnly, rules...) }
	for _, test := range []struct {
		name string
		p, q Policy
		want bool
	}{
		{"the zero policy is the default one", Policy{}, allows(), true},
		{"nothing is within all", denies(), allows(), true},
		{"all is not within nothing", allows(), denies(), false},
		{"nothing asks less than DNS only", denies(), dnsOnly(), true},
		{"DNS only asks more than nothing", dnsOnly(), denies(), false},
		{"DNS only is within all", dnsOnly(), allows(), true},
		{"all by a rule, names too", dnsOnly(), denies("allow *"), true},
		{"one more that is denied", allows("deny bad.example", "deny worse.example"), allows("deny bad.example"), true},
		{"one less that is denied", allows("deny bad.example"), allows("deny bad.example", "deny worse.example"), false},
		{"what is denied is denied as part of more", allows("deny *.example"), allows("deny bad.example"), true},
		{"what is denied is denied for one port only", allows("deny bad.example:443"), allows("deny bad.example"), false},
		{"one less that is allowed", denies("allow good.example"), denies("allow good.example", "allow fine.example"), true},
		{"one more that is allowed", denies("allow good.example", "allow fine.example"), denies("allow good.example"), false},
		{"a name below a wildcard", denies("allow www.good.example:443/tcp"), denies("allow *.good.example"), true},
		{"a wildcard below a wildcard", denies("allow *.www.good.example"), denies("allow *.good.example"), true},
		{"the name itself is not below", denies("allow good.example"), denies("allow *.good.example"), false},
		{"a wildcard is not within a name", denies("allow *.good.example"), denies("allow good.example"), false},
		{"a network within a network", denies("allow 10.1.0.0/16:80"), denies("allow 10.0.0.0/8:1-1024"), true},
		{"a network beside a network", denies("allow 11.0.0.0/16"), denies("allow 10.0.0.0/8"), false},
		{"a network around a network", denies("allow 0.0.0.0/0"), denies("allow 10.0.0.0/8"), false},
		{"fewer ports", denies("allow *:80"), denies("allow *:80-90"), true},
		{"more ports", denies("allow *:80-91"), denies("allow *:80-90"), false},
		{"all ports", denies("allow *"), denies("allow *:80-90"), false},
		{"one protocol", denies("allow */tcp"), denies("allow *"), true},
		{"all protocols", denies("allow *"), denies("allow */tcp"), false},
		{"a name has any address", denies("allow good.example"), denies("allow 0.0.0.0/0", "allow [::/0]"), false},
		{"what is denied before counts", denies("allow 10.0.0.0/8"), denies("deny 10.1.0.0/16", "allow 10.0.0.0/8"), false},
		{"what is denied before is denied", denies("deny 10.1.0.0/16", "allow 10.0.0.0/8"), denies("deny 10.1.0.0/16", "allow 10.0.0.0/8"), true},
		{"what is denied before is elsewhere", denies("allow 10.2.0.0/16"), denies("deny 10.1.0.0/16", "allow 10.0.0.0/8"), true},
		{"what is denied before has another port", denies("allow 10.2.0.0/16:80"), denies("deny *:22", "allow 10.0.0.0/8"), true},
		{"what is denied before has another protocol", denies("allow 10.2.0.0/16/tcp"), denies("deny */udp", "allow 10.0.0.0/8"), true},
		{"what is denied behind does not count", denies("allow 10.2.0.0/16"), denies("allow 10.0.0.0/8", "deny 10.2.0.0/16"), true},
		{"a flow may have the denied name, too", denies("allow good.example"), denies("deny bad.example", "allow good.example"), false},
		{"what is allowed but dead", denies("deny *", "allow bad.example"), denies(), true},
		{"a place", denies("allow @host:80"), denies("allow @host"), true},
		{"a place is not everything", denies("allow @host"), denies("allow *"), false},
		{"nor the default", allows("deny bad.example", "allow @vms"), allows("deny bad.example"), false},
		{"an address of metadata opens it", denies("allow 168.63.129.16"), denies("allow 168.63.129.0/24"), false},
		{"the same address", denies("allow 168.63.129.16:80"), denies("allow 168.63.129.16"), true},
		{"a link-local network opens it", allows("allow 169.254.1.0/24"), allows(), false},
		{"within a link-local network", allows("allow 169.254.1.0/24"), allows("allow 169.254.0.0/16"), true},
		{"a name server opens port 53", denies("allow 10.1.1.1:53"), denies("allow 10.0.0.0/8"), false},
		{"the same port", denies("allow 10.1.1.1:53/udp"), denies("allow 10.0.0.0/8:53"), true},
		{"port 53 is open where nothing is denied by name", denies("allow 10.1.1.1:53"), allows(), true},
		{"other name servers", allows(), allows("deny bad.example"), false},
		{"other name servers, everything allowed", allows(), denies("allow *"), false},
		{"DNS over HTTPS", denies("allow dns.google"), denies("allow *.google"), false},
		{"the same name server", denies("allow dns.google:443"), denies("allow dns.google"), true},
	} {
		if got := test.p.Within(test.q); got != test.want {
			t.Errorf("%s: %v within %v is %t", test.name, test.p, test.q, got)
		}
		for _, p := range []Policy{test.p, test.q} {
			if !p.Within(p) {
				t.Errorf("%s: %v is not within itself", test.name, p)
			}
		}
	}
}

// Rules and flows of a small world, in which they meet often.
var (
	worldDomains = []string{"a.example", "b.example", "x.a.example", "dns.google"}
	worldTargets = append(append([]string{"*.example", "*.a.example", "*"}, worldDomains...), "10.0.0.0/8", "10.1.0.0/16", "10.1.1.1",
		"203.0.113.0/24", "203.0.113.1", "203.0.0.0/8", "169.254.169.254", "169.254.0.0/16", "168.63.129.16", "168.63.129.0/24", "1.1.1.1",
		"0.0.0.0/0", "[::/0]", "[2001:db8::/32]", "[64:ff9b::/96]", "@host", "@vms")
	worldPorts = []string{"", "", ":53", ":443", ":50-60", ":400-500", ":1-65535"}
	worldAddrs = []string{"10.1.1.1", "10.2.2.2", "203.0.113.1", "203.0.113.2", "169.254.169.254", "169.254.1.1", "168.63.129.16", "1.1.1.1",
		"127.0.0.1", "2001:db8::1", "::ffff:10.1.1.1", "64:ff9b::a9fe:a9fe", "64:ff9b::a01:101"}
)

func drawPolicy(t *rapid.T, name string) Policy {
	p := Policy{Default: rapid.SampledFrom([]Default{"", DefaultAllow, DefaultDeny, DefaultDeny, DefaultDNSOnly}).Draw(t, name+": default")}
	for range rapid.IntRange(0, 4).Draw(t, name+": rules") {
		p.Rules = append(p.Rules, drawRule(t, name))
	}
	return p
}

func drawRule(t *rapid.T, name string) Rule {
	text := rapid.SampledFrom([]string{"allow ", "deny "}).Draw(t, name+": action") +
		rapid.SampledFrom(worldTargets).Draw(t, name+": target") +
		rapid.SampledFrom(worldPorts).Draw(t, name+": ports") +
		rapid.SampledFrom([]string{"", "", "/tcp", "/udp"}).Draw(t, name+": protocol")
	rule, err := ParseRule(text)
	if err != nil {
		t.Fatal(err)
	}
	return rule
}

func drawFlow(t *rapid.T) Flow {
	drawn := func(what string, from []string) string { return rapid.SampledFrom(from).Draw(t, what) }
	f := Flow{
		Protocol: smolvm.Protocol(drawn("protocol", []string{"tcp", "udp", "icmp"})),
		To: netip.AddrPortFrom(netip.MustParseAddr(drawn("address", worldAddrs)),
			rapid.SampledFrom([]uint16{53, 55, 443, 450, 9999}).Draw(t, "port")),
		Host: rapid.IntRange(0, 5).Draw(t, "host") == 0,
		VMs:  rapid.IntRange(0, 5).Draw(t, "VMs") == 0,
		Names: Names{
			Asked:  rapid.SliceOfN(rapid.SampledFrom(worldDomains), 0, 3).Draw(t, "asked"),
			SNI:    drawn("SNI", append([]string{"", ""}, worldDomains...)),
			Host:   drawn("Host", append([]string{"", ""}, worldDomains...)),
			Hidden: rapid.IntRange(0, 4).Draw(t, "hidden") == 0,
		},
	}
	if f.Protocol == ICMP {
		f.To = netip.AddrPortFrom(f.To.Addr(), 0)
	}
	return f
}

// What is within another policy allows nothing that the other denies. Half of the pairs are
// close to each other, as a policy and one that narrows it are.
func TestWithinIsSound(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		q := drawPolicy(t, "q")
		p := q
		if rapid.Bool().Draw(t, "close") {
			p.Rules = slices.Clone(q.Rules)
			switch at := rapid.IntRange(0, len(p.Rules)).Draw(t, "at"); {
			case rapid.Bool().Draw(t, "insert"):
				p.Rules = slices.Insert(p.Rules, at, drawRule(t, "p"))
			case at < len(p.Rules):
				p.Rules[at] = drawRule(t, "p")
			}
		} else {
			p = drawPolicy(t, "p")
		}
		if !q.Within(q) {
			t.Fatalf("%v is not within itself", q)
		}
		if !p.Within(q) {
			return
		}
		for range 20 {
			f := drawFlow(t)
			if inner, outer := p.Verdict(f), q.Verdict(f); inner.Allowed && !outer.Allowed {
				t.Fatalf("%v is within %v, and %+v is %v by one and %v by the other", p, q, f, inner, outer)
			}
		}
		for _, name := range worldDomains {
			if inner, outer := p.Question(name), q.Question(name); inner.Allowed && !outer.Allowed {
				t.Fatalf("%v is within %v, and a question for %s is %v by one and %v by the other", p, q, name, inner, outer)
			}
		}
	})
}

// The two ways to narrow a policy that are promised to be recognised are.
func TestWithinNarrowed(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		q := drawPolicy(t, "q")
		denied := drawRule(t, "denied")
		denied.Action = Deny
		p := Policy{Default: q.Default, Rules: slices.Insert(slices.Clone(q.Rules), 0, denied)}
		if !p.Within(q) {
			t.Errorf("%v is not within %v", p, q)
		}
		if q.Default == DefaultDeny {
			i := slices.IndexFunc(q.Rules, func(r Rule) bool { return r.Action == Allow })
			if i < 0 {
				return
			}
			p = Policy{Default: q.Default, Rules: slices.Delete(slices.Clone(q.Rules), i, i+1)}
			if !p.Within(q) {
				t.Errorf("%v is not within %v", p, q)
			}
		}
	})
}

// No rule allows a flow by a name for which the guest was not told the address, nor to an
// address that is not public: guests choose which names they state, and owners of names where
// these lead.
func TestNamesProveNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, f := drawPolicy(t, "p"), drawFlow(t)
		if v := p.Verdict(f); v.Allowed && v.Rule.Domain != "" && !isPublic(f.To.Addr().Unmap()) {
			t.Fatalf("%v allows %+v by a name: %v", p, f, v)
		}
		f.Names.Asked = nil
		if v := p.Verdict(f); v.Allowed && v.Rule.Domain != "" {
			t.Fatalf("%v allows %+v by a name that the guest was told nothing for: %v", p, f, v)
		}
	})
}
