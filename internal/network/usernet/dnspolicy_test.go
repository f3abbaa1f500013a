package usernet

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

// The resolver tells the guest no more than the policy lets it have.
func TestDNSPolicy(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	zone := []string{
		"good.example. 60 IN A 203.0.113.1",
		"www.good.example. 60 IN CNAME cdn.example.",
		"cdn.example. 60 IN A 203.0.113.3",
		"inside.good.example. 60 IN A 192.168.1.1",
		"both.good.example. 60 IN A 192.168.1.1",
		"both.good.example. 60 IN A 203.0.113.4",
		"local.good.example. 60 IN A 127.0.0.1",
		"good.example. 60 IN HTTPS 1 . alpn=\"h2\" ipv4hint=203.0.113.9 ech=AAAA",
		"bad.example. 60 IN A 203.0.113.2",
		`evil\.good.example. 60 IN A 203.0.113.5`,
	}
	server := newNameServer(t, "127.0.0.1", func(query, reply *dns.Msg) {
		name := query.Question[0].Name
		for range 2 {
			for _, text := range zone {
				rr := record(t, text)
				kind := rr.Header().Rrtype
				if strings.EqualFold(rr.Header().Name, name) && (kind == query.Question[0].Qtype || kind == dns.TypeCNAME) {
					reply.Answer = append(reply.Answer, rr)
				}
			}
			if len(reply.Answer) != 1 || reply.Answer[0].Header().Rrtype != dns.TypeCNAME {
				break
			}
			name = reply.Answer[0].(*dns.CNAME).Target
		}
		if len(reply.Answer) == 0 {
			reply.Rcode = dns.RcodeNameError
		}
	})
	files := hostFiles(t)
	writeHostFiles(t, files, "nameserver 127.0.0.1\n", "")
	n := newWithFiles(t, usualLimits(), files)
	g := newGuest(t, n)
	conn := packetConn{g.dialUDP(netip.AddrPortFrom(testConfig().Gateway, dnsPort))}
	byName := policytest.PolicyOf(t, network.DefaultDeny, "allow good.example", "allow *.good.example")
	var revision int64
	for _, test := range []struct {
		policy network.Policy
		name   string
		kind   uint16
		rcode  int
		want   string // the data of the last records
	}{
		{byName, "good.example.", dns.TypeA, dns.RcodeSuccess, "203.0.113.1"},
		{byName, "GOOD.example.", dns.TypeA, dns.RcodeSuccess, "203.0.113.1"},
		{byName, "www.good.example.", dns.TypeA, dns.RcodeSuccess, "cdn.example. 203.0.113.3"},
		{byName, "cdn.example.", dns.TypeA, dns.RcodeNameError, ""},
		{byName, "bad.example.", dns.TypeA, dns.RcodeNameError, ""},
		{byName, "bad.example.", dns.TypeTXT, dns.RcodeNameError, ""},
		{byName, "dns.google.", dns.TypeA, dns.RcodeNameError, ""},
		{byName, `evil\.good.example.`, dns.TypeA, dns.RcodeNameError, ""},
		{byName, "localhost.", dns.TypeA, dns.RcodeSuccess, "127.0.0.1"},
		{byName, "inside.good.example.", dns.TypeA, dns.RcodeSuccess, ""},
		{byName, "local.good.example.", dns.TypeA, dns.RcodeSuccess, ""},
		{byName, "both.good.example.", dns.TypeA, dns.RcodeSuccess, "203.0.113.4"},
		{byName, "good.example.", dns.TypeHTTPS, dns.RcodeSuccess, `1 . alpn="h2"`},
		{policytest.PolicyOf(t, network.DefaultDeny, "allow good.example", "allow *.good.example", "allow 192.168.1.0/24"),
			"inside.good.example.", dns.TypeA, dns.RcodeSuccess, "192.168.1.1"},
		{policytest.PolicyOf(t, network.DefaultDNSOnly, "deny bad.example"), "good.example.", dns.TypeA, dns.RcodeSuccess, "203.0.113.1"},
		{policytest.PolicyOf(t, network.DefaultDNSOnly, "deny bad.example"), "bad.example.", dns.TypeA, dns.RcodeNameError, ""},
		{policytest.PolicyOf(t, network.DefaultAllow, "deny 198.51.100.0/24"), "inside.good.example.", dns.TypeA, dns.RcodeSuccess, "192.168.1.1"},
		{network.Policy{}, "local.good.example.", dns.TypeA, dns.RcodeSuccess, "127.0.0.1"},
	} {
		revision++
		if err := n.SetEgress(network.Egress{Revision: revision, Policy: test.policy}); err != nil {
			t.Fatal(err)
		}
		asked := server.asked.Load()
		answer := ask(t, conn, test.name, test.kind)
		var got []string
		for _, rr := range answer.Answer {
			got = append(got, strings.TrimPrefix(rr.String(), rr.Header().String()))
		}
		if answer.Rcode != test.rcode || strings.Join(got, " ") != test.want {
			t.Errorf("%v: %s is %s %q, want %s %q", test.policy, test.name, dns.RcodeToString[answer.Rcode], got, dns.RcodeToString[test.rcode], test.want)
		}
		if test.rcode == dns.RcodeNameError && (server.asked.Load() != asked || len(answer.Ns) != 1 || answer.Ns[0].Header().Ttl != 0) {
			t.Errorf("%s: it is asked outside, or may be remembered: %s", test.name, answer)
		}
	}
	query := new(dns.Msg).SetQuestion("bad.example.", dns.TypeA)
	query.SetEdns0(4096, false)
	revision++
	if err := n.SetEgress(network.Egress{Revision: revision, Policy: byName}); err != nil {
		t.Fatal(err)
	}
	if answer := exchangeOn(t, conn, query); !strings.Contains(answer.String(), "egress policy") {
		t.Errorf("it is not told why: %s", answer)
	}
	// What proves the name of a flow is the name that was asked for, not that of an alias.
	if got := n.outbound.Names().Of(netip.MustParseAddr("203.0.113.3")); !slices.Equal(got, []string{"www.good.example"}) {
		t.Errorf("the address of an alias is one of %q", got)
	}
	if got := n.outbound.Names().Of(netip.MustParseAddr("203.0.113.5")); len(got) != 0 {
		t.Errorf("an escaped name is remembered: %q", got)
	}
}
