package network

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"github.com/smolvm/smolvm"
)

// PolicyOf reads a policy in the form in which users give it. The error is a
// [*smolvm.ValidationError] that names every bad rule.
func PolicyOf(public smolvm.EgressPolicy) (Policy, error) {
	var p Policy
	var wrong []smolvm.FieldError
	bad := func(field string, err error) {
		wrong = append(wrong, smolvm.FieldError{Field: field, Problem: err.Error()})
	}
	if public.Default != "" {
		if err := p.Default.UnmarshalText([]byte(public.Default)); err != nil {
			bad("egress.default", err)
		}
	}
	if len(public.Rules) > MaxRules {
		bad("egress.rules", fmt.Errorf("%d are too many; at most %d are allowed", len(public.Rules), MaxRules))
		public.Rules = nil
	}
	for i, text := range public.Rules {
		rule, err := ParseRule(text)
		if err != nil {
			bad(fmt.Sprintf("egress.rules[%d]", i), err)
		}
		p.Rules = append(p.Rules, rule)
	}
	if len(wrong) > 0 {
		return Policy{}, &smolvm.ValidationError{Fields: wrong}
	}
	return p, nil
}

// Destination is what a user asks a policy about.
type Destination struct {
	// Name is the name that is resolved; empty: the address itself.
	Name string
	// Flow is what follows; its address is not valid if there is only a name.
	Flow Flow
}

// ParseDestination reads NAME, ADDRESS or NAME=ADDRESS, each with or without :PORT and
// /PROTOCOL, or a URL. Addresses of IPv6 are in brackets if a port follows.
func ParseDestination(text string) (Destination, error) {
	fail := func(err error) (Destination, error) {
		return Destination{}, fmt.Errorf("destination %q: %w", text, err)
	}
	if len(text) > maxRule {
		return Destination{}, fmt.Errorf("a destination of %d bytes is too long; %d are allowed", len(text), maxRule)
	}
	rest, port := text, uint16(0)
	if scheme, after, ok := strings.Cut(text, "://"); ok {
		ports := map[string]uint16{"http": 80, "ws": 80, "https": httpsPort, "wss": httpsPort}
		if port, ok = ports[strings.ToLower(scheme)]; !ok {
			return fail(fmt.Errorf("the port of %q is not known; give a name and a port, as in example.com:443", scheme))
		}
		if i := strings.IndexAny(after, "/?#"); i >= 0 {
			after = after[:i]
		}
		rest = after[strings.LastIndexByte(after, '@')+1:]
	}
	var d Destination
	name, target, hasAddr := strings.Cut(rest, "=")
	if hasAddr {
		rest = target
	}
	// The rest is that of a rule.
	rule, err := ParseRule("allow " + rest)
	switch {
	case err != nil && strings.Count(rest, ":") > 1 && !strings.HasPrefix(rest, "["):
		rule, err = ParseRule("allow [" + rest + "]")
		if err != nil {
			return fail(fmt.Errorf("%q is no address; put one of IPv6 in brackets if a port follows", rest))
		}
	case err != nil:
		return fail(fmt.Errorf("%q is not of the form NAME or ADDRESS, with or without :PORT and /PROTOCOL", rest))
	}
	if hasAddr {
		named, err := ParseRule("allow " + name)
		if err != nil || named.Domain == "" || !rule.CIDR.IsValid() || !named.Ports.all() || named.Protocol != "" {
			return fail(fmt.Errorf("use NAME=ADDRESS for a name that leads to an address, as in example.com=192.0.2.1:443"))
		}
		rule.Domain = named.Domain
	}
	if strings.HasPrefix(rule.Domain, "*") || rule.Ports.First != rule.Ports.Last || rule.Place != "" ||
		rule.Domain == "" && !rule.CIDR.IsSingleIP() {
		return fail(fmt.Errorf("name one host and one port"))
	}
	d.Name = rule.Domain
	d.Flow = Flow{Protocol: rule.Protocol, To: netip.AddrPortFrom(rule.CIDR.Addr(), cmp.Or(rule.Ports.First, port))}
	if d.Flow.Protocol == "" && d.Flow.To.Port() != 0 {
		d.Flow.Protocol = smolvm.TCP
	}
	return d, nil
}

// somewhere stands for the address of a name that nobody has resolved: it is public, and in no
// network that is in use (RFC 7526).
var somewhere = netip.AddrFrom4([4]byte{192, 88, 99, 1})

// Test returns what a policy says of a destination, and why, for a person. The flow is taken to
// state its name, as those of TLS and HTTP do.
func (p Policy) Test(d Destination) (Verdict, string) {
	if d.Name == "" {
		v := p.Verdict(d.Flow)
		return v, v.String()
	}
	if v := p.Question(d.Name); !v.Allowed {
		return v, "the name is not resolved: " + v.String()
	}
	note := ""
	if !d.Flow.To.Addr().IsValid() {
		d.Flow.To = netip.AddrPortFrom(somewhere, d.Flow.To.Port())
		note = ", if the name leads to a public address"
	}
	d.Flow.Names = Names{Asked: []string{d.Name}}
	if d.Flow.Protocol != smolvm.UDP && d.Flow.Protocol != ICMP {
		d.Flow.Names.SNI = d.Name
	}
	if d.Flow.Protocol == smolvm.UDP && d.Flow.To.Port() == httpsPort {
		d.Flow.Names.Hidden = true // as QUIC's is
		note += "; QUIC's name can't be read, so no rule with a name allows it"
	}
	v := p.Verdict(d.Flow)
	if !v.Allowed && note == ", if the name leads to a public address" {
		note = ""
	}
	return v, v.String() + note
}

// Last returns the last address of a network.
func Last(n netip.Prefix) netip.Addr {
	bytes := n.Masked().Addr().AsSlice()
	for bit := n.Bits(); bit < len(bytes)*8; bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	addr, _ := netip.AddrFromSlice(bytes)
	return addr
}
