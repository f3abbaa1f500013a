package network

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/smolvm/smolvm"
)

// Policy says what a guest may reach. It is plain data, and asks nothing: whoever carries a
// guest's flows tells [Policy.Verdict] what it knows of each, whichever way the guest is
// connected. The zero value allows all that is not closed always; see [Closed].
type Policy struct {
	// Default decides where no rule does. Empty: [DefaultAllow].
	Default Default `json:"default,omitempty"`
	// Rules are tried in order. The first one that matches decides.
	Rules []Rule `json:"rules,omitempty"`
}

// MaxRules is how many rules a policy that is read may have: each flow is compared with them.
const MaxRules = 1000

// Default is what becomes of flows that no rule matches.
type Default string

const (
	// DefaultAllow lets them out.
	DefaultAllow Default = "allow"
	// DefaultDeny lets nothing out, and resolves no name but those that a rule allows.
	DefaultDeny Default = "deny"
	// DefaultDNSOnly lets nothing out, and resolves all names that no rule denies.
	DefaultDNSOnly Default = "dns-only"
)

// UnmarshalText implements [encoding.TextUnmarshaler].
func (d *Default) UnmarshalText(text []byte) error {
	switch known := Default(text); known {
	case DefaultAllow, DefaultDeny, DefaultDNSOnly:
		*d = known
		return nil
	}
	return fmt.Errorf("default %q of a policy is not known; use %s, %s or %s", text, DefaultAllow, DefaultDeny, DefaultDNSOnly)
}

// UnmarshalJSON implements [json.Unmarshaler]. A field that is not known is an error: it may
// be one that denies something.
func (p *Policy) UnmarshalJSON(text []byte) error {
	type plain Policy
	var read plain
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&read); err != nil {
		return fmt.Errorf("read a policy: %w", err)
	}
	if len(read.Rules) > MaxRules {
		return fmt.Errorf("read a policy: it has %d rules; at most %d are allowed", len(read.Rules), MaxRules)
	}
	*p = Policy(read)
	return nil
}

// Flow is a connection, or datagrams from one port to one address, that a guest wants to have
// with the outside, as far as it is known.
type Flow struct {
	// Protocol is TCP, UDP or [ICMP]. Empty, and a port of 0 (where there are ports): any;
	// the verdict then is whether one of these flows may be allowed.
	Protocol smolvm.Protocol
	To       netip.AddrPort
	Names    Names
	// Host reports that the flow would reach the host itself: by its routes, at the moment.
	Host bool
	// VMs reports that the address is in a network of VMs, the guest's own included.
	VMs bool
}

// Names are the names that are known for a flow.
type Names struct {
	// Asked are the names for which the sandbox's own resolver has told the guest the flow's
	// address, for as long as it has said that they may be kept. They prove what the address
	// belongs to.
	Asked []string
	// SNI and Host are what the flow itself states, by TLS and by HTTP (with or without a
	// port); empty: nothing, or nothing yet. They prove nothing: the guest chooses them.
	SNI, Host string
	// Hidden reports that the flow's protocol is one that states a name, and that the name
	// can't be read: TLS without SNI or with an encrypted hello, QUIC. No rule with a domain
	// allows such a flow, and each one that denies does so.
	Hidden bool
}

// Verdict is what a policy says of a flow or a question.
type Verdict struct {
	Allowed bool
	// Number is that of the rule that decided, from 1 on, and Rule that rule. Zero: no rule
	// did, but Closed, or else the policy's default.
	Number int
	Rule   Rule
	// Closed is why the flow is closed always; empty: it is not.
	Closed Closed
	// Provisional reports that the flow has stated no name so far, and that one may change
	// the verdict: ask again when the flow's first bytes are there.
	Provisional bool
}

// String returns what decided, for a person.
func (v Verdict) String() string {
	action := "denied"
	if v.Allowed {
		action = "allowed"
	}
	switch {
	case v.Number != 0:
		return fmt.Sprintf("%s by rule %d: %s", action, v.Number, v.Rule)
	case v.Closed != "":
		return action + ": it is " + v.Closed.why()
	}
	return action + " by default"
}

// Verdict returns what the policy says of a flow.
//
// A rule with a domain matches a flow by the name that the flow states, and allows it only
// if the guest was told the address for that name. A flow that states several names must be
// allowed by each of them. One that states none is one to whatever has its address, so any
// name that the guest was told the address for will do. No name allows a flow to an address
// that is not public: whoever owns a name can have it lead anywhere.
func (p Policy) Verdict(f Flow) Verdict {
	f.To = netip.AddrPortFrom(f.To.Addr().Unmap().WithZone(""), f.To.Port())
	asked := normalNames(f.Names.Asked)
	stated := normalNames([]string{f.Names.SNI, withoutPort(f.Names.Host)})
	views := make([]view, 0, len(stated)+1)
	proved := true
	for _, name := range stated {
		known := slices.Contains(asked, name)
		proved = proved && known
		views = append(views, view{names: []string{name}, proved: known})
	}
	if len(stated) == 0 || !proved && len(asked) > 0 {
		views = append(views, view{names: asked, proved: true})
	}
	var verdict Verdict
	for i, v := range views {
		v.hidden = f.Names.Hidden
		one := p.judge(f, v)
		if i == 0 || !one.Allowed {
			verdict = one
		}
		if !one.Allowed {
			break
		}
	}
	if len(stated) > 0 || f.Names.Hidden || f.Protocol == ICMP || !verdict.Allowed && len(asked) == 0 {
		verdict.Provisional = false
	}
	return verdict
}

// view is a flow under names which stand for it: one of them, at least.
type view struct {
	names  []string
	proved bool // the guest was told the flow's address for them
	hidden bool // as in [Names]
}

func (p Policy) judge(f Flow, v view) Verdict {
	closed := closedTo(f, v, p.Restricts())
	byName := false
	for i, rule := range p.Rules {
		if !rule.hasPort(f) {
			continue
		}
		byName = byName || rule.Domain != ""
		if rule.matches(f, v) && (rule.Action == Deny || rule.opensAll(closed)) {
			return Verdict{Allowed: rule.Action == Allow, Number: i + 1, Rule: rule, Provisional: byName}
		}
	}
	if len(closed) > 0 {
		return Verdict{Closed: closed[0]}
	}
	return Verdict{Allowed: p.allowsByDefault(), Provisional: byName}
}

// allowsByDefault reports whether flows that no rule matches are let out.
func (p Policy) allowsByDefault() bool { return p.Default == DefaultAllow || p.Default == "" }

// Restricts reports whether the policy says by which name, or whether at all, a guest gets
// out. Then the sandbox's resolver must be the only one.
func (p Policy) Restricts() bool {
	return !p.allowsByDefault() || slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.Domain != "" })
}

// Question returns whether the sandbox's resolver tells the guest what a name leads to: if a
// flow to that name could be allowed by a rule, or if the default resolves all names. Rules
// with addresses have no say.
func (p Policy) Question(name string) Verdict {
	name = normalName(name)
	var closed []Closed
	if p.Restricts() && isResolverName(name) {
		closed = []Closed{ClosedForeignDNS}
	}
	for i, rule := range p.Rules {
		asks, ok := rule.question()
		if !ok || !asks.hasName([]string{name}) {
			continue
		}
		if rule.Action == Deny || asks.opensAll(closed) {
			return Verdict{Allowed: rule.Action == Allow, Number: i + 1, Rule: rule}
		}
	}
	if len(closed) > 0 {
		return Verdict{Closed: closed[0]}
	}
	return Verdict{Allowed: p.Default != DefaultDeny}
}

// Answer reports whether the sandbox's resolver tells the guest an address for a name that it
// answers questions for. Whoever owns a name can have it lead into a private network, so under
// a policy by names an address that is not public is told only if a rule allows it.
func (p Policy) Answer(name string, addr netip.Addr) bool {
	addr = addr.Unmap()
	return !p.Restricts() || isPublic(addr) ||
		p.Verdict(Flow{To: netip.AddrPortFrom(addr, 0), Names: Names{Asked: []string{name}}}).Allowed
}

// withoutPort returns the name of an HTTP Host, which may have a port.
func withoutPort(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return host
}

// normalName returns a name in the form in which names are compared.
func normalName(name string) string {
	lower := strings.Map(func(c rune) rune { // ASCII only, as DNS compares names
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		return c
	}, name)
	return strings.TrimSuffix(lower, ".")
}

// normalNames returns names as normalName does, without empty ones.
func normalNames(names []string) []string {
	normal := make([]string, 0, len(names))
	for _, name := range names {
		if name = normalName(name); name != "" {
			normal = append(normal, name)
		}
	}
	return normal
}
