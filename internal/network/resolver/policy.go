package resolver

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm/internal/network"
)

// isPermitted reports whether a policy lets the guest have a name resolved.
func isPermitted(p network.Policy, name string) bool {
	return p.Question(name).Allowed && (IsComparable(name) || !p.Restricts())
}

// blocked is the reply to a question that the policy does not allow: that there is no such
// name, not to be remembered, and, for who understands it, why (RFC 8914, section 4.16). It is
// not REFUSED, as then resolvers ask the next server, or wait and ask again (musl for ten
// seconds), and programs are to fail at once.
func blocked(query *dns.Msg) *dns.Msg {
	reply := newReply(query, dns.RcodeNameError)
	reply.Ns = []dns.RR{noSuch(query.Question[0].Name, madeTTL)}
	explain(reply)
	return reply
}

// explain says in a reply that it is the policy's.
func explain(reply *dns.Msg) {
	if options := reply.IsEdns0(); options != nil {
		options.Option = append(options.Option, &dns.EDNS0_EDE{
			InfoCode: dns.ExtendedErrorCodeBlocked, ExtraText: "the VM's egress policy",
		})
	}
}

// permitted returns what the guest is told of an answer: without addresses that it may not
// have, and without what would lead it around the policy.
func permitted(p network.Policy, query, answer *dns.Msg) *dns.Msg {
	if !p.Restricts() {
		return answer
	}
	name := query.Question[0].Name
	if !isPermitted(p, name) {
		return blocked(query)
	}
	removed := false
	for _, section := range []*[]dns.RR{&answer.Answer, &answer.Ns, &answer.Extra} {
		*section = slices.DeleteFunc(*section, func(record dns.RR) bool {
			addr, ok := addrOf(record)
			if !ok {
				return false
			}
			denied := !p.Answer(name, addr)
			removed = removed || denied
			return denied
		})
		for _, record := range *section {
			withoutHints(record)
		}
	}
	if removed {
		if len(answer.Answer) == 0 {
			answer.Ns = []dns.RR{noSuch(name, madeTTL)}
		}
		explain(answer)
	}
	return answer
}

// addrOf returns the address in a record.
func addrOf(record dns.RR) (netip.Addr, bool) {
	switch record := record.(type) {
	case *dns.A:
		return netip.AddrFromSlice(record.A)
	case *dns.AAAA:
		return netip.AddrFromSlice(record.AAAA)
	}
	return netip.Addr{}, false
}

// withoutHints takes out of a record how to reach a service (RFC 9460) what makes a client
// state its name so that it can't be read, and addresses that it was not told by name.
func withoutHints(record dns.RR) {
	var values *[]dns.SVCBKeyValue
	switch record := record.(type) {
	case *dns.HTTPS:
		values = &record.Value
	case *dns.SVCB:
		values = &record.Value
	default:
		return
	}
	*values = slices.DeleteFunc(*values, func(value dns.SVCBKeyValue) bool {
		return slices.Contains([]dns.SVCBKey{dns.SVCB_ECHCONFIG, dns.SVCB_IPV4HINT, dns.SVCB_IPV6HINT}, value.Key())
	})
}

// IsComparable reports whether a name in DNS's form for people means what it seems to: one
// with an escaped dot is not below the name that it ends with.
func IsComparable(name string) bool { return !strings.Contains(name, `\`) }
