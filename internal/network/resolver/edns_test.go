package resolver

import (
	"testing"

	"github.com/miekg/dns"
)

// An answer with EDNS is passed on with its other records, and with why it failed where that can be
// said. One whose question had no EDNS made the resolver panic, and with it the shim.
func TestPassOnEDNS(t *testing.T) {
	t.Parallel()
	for _, asked := range []bool{true, false} {
		query := new(dns.Msg).SetQuestion("example.com.", dns.TypeSRV)
		if asked {
			query.SetEdns0(1232, false)
		}
		said := new(dns.Msg).SetReply(query)
		said.Extra = append(said.Extra, &dns.A{Hdr: dns.RR_Header{Name: "a.example.com.", Rrtype: dns.TypeA, Class: dns.ClassINET}})
		said.SetEdns0(4096, false)
		said.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeStaleAnswer}}
		reply := (&Resolver{}).passOn(query, said)
		ours := reply.IsEdns0()
		if asked != (ours != nil && len(ours.Option) == 1) || reply.Extra[0].Header().Rrtype != dns.TypeA {
			t.Errorf("asked with EDNS: %t, it is passed on as %v", asked, reply)
		}
	}
}
