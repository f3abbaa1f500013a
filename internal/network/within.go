package network

import (
	"net/netip"
	"slices"
	"strings"
)

// Within reports whether p allows nothing that q denies, whatever the guest does: no flow,
// and no question for a name. It is conservative: true is certain, and false may be said of
// two policies for which it can't be told from their rules one by one. A policy is always
// within itself, and so is what is made of it by taking rules that allow away, where the
// default denies, or by adding rules that deny before all others.
func (p Policy) Within(q Policy) bool {
	restricted := q.Restricts()
	if restricted && !p.Restricts() {
		return false // p leaves other name servers open
	}
	return p.flows().within(q.flows(), restricted) && p.questions().within(q.questions(), restricted)
}

// ruleList is rules in order, and whether what none of them matches is allowed.
type ruleList struct {
	rules []Rule
	open  bool
}

func (p Policy) flows() ruleList { return ruleList{p.Rules, p.allowsByDefault()} }

func (p Policy) questions() ruleList {
	l := ruleList{open: p.Default != DefaultDeny}
	for _, rule := range p.Rules {
		if asks, ok := rule.question(); ok {
			l.rules = append(l.rules, asks)
		}
	}
	return l
}

func (l ruleList) within(outer ruleList, restricted bool) bool {
	for i, rule := range l.rules {
		if rule.Action == Allow && !outer.admits(rule, l.rules[:i], restricted) {
			return false
		}
	}
	return !l.open || outer.admits(Rule{Action: Allow}, l.rules, restricted)
}

// admits reports whether all is allowed that an allowing rule allows and that none of the
// denying rules before it denies.
func (l ruleList) admits(allowed Rule, before []Rule, restricted bool) bool {
	denied := func(what Rule) bool {
		return slices.ContainsFunc(before, func(b Rule) bool { return b.Action == Deny && b.includes(what) })
	}
	if denied(allowed) {
		return true
	}
	for _, rule := range l.rules {
		switch {
		case rule.Action == Allow:
			if rule.includes(allowed) && rule.opensAll(allowed.opened(restricted)) {
				return true
			}
		case rule.mayOverlap(allowed) && !denied(rule):
			return false
		}
	}
	return l.open && len(allowed.opened(restricted)) == 0
}

// opened returns what a rule opens of what is closed always.
func (r Rule) opened(restricted bool) []Closed {
	var opened []Closed
	for _, c := range []Closed{ClosedHost, ClosedVMs, ClosedLinkLocal, ClosedMetadata, ClosedForeignDNS} {
		if r.opens(c) && (c != ClosedForeignDNS || restricted) {
			opened = append(opened, c)
		}
	}
	return opened
}

// includes reports whether a rule matches every flow that another one matches, if both do the
// same with it.
func (r Rule) includes(other Rule) bool {
	if r.Protocol != "" && r.Protocol != other.Protocol || !r.Ports.includes(other.Ports) {
		return false
	}
	switch {
	case r.Place != "":
		return r.Place == other.Place
	case r.CIDR.IsValid():
		return includesPrefix(r.CIDR, other.CIDR)
	case r.Domain != "":
		return includesDomain(r.Domain, other.Domain)
	}
	return true
}

// mayOverlap reports whether a flow may match both rules. A flow may have several names, and
// names and places have any address, so only ports, protocols and networks tell.
func (r Rule) mayOverlap(other Rule) bool {
	switch {
	case r.Protocol != "" && other.Protocol != "" && r.Protocol != other.Protocol,
		r.Protocol == ICMP && !other.Ports.all(), other.Protocol == ICMP && !r.Ports.all(),
		!r.Ports.overlaps(other.Ports):
		return false
	}
	return !r.CIDR.IsValid() || !other.CIDR.IsValid() || r.CIDR.Overlaps(other.CIDR)
}

func includesPrefix(outer, inner netip.Prefix) bool {
	return inner.IsValid() && outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

// includesDomain reports whether all names that the second domain stands for are ones that
// the first stands for.
func includesDomain(outer, inner string) bool {
	below, wildcard := strings.CutPrefix(outer, "*")
	return outer == inner || wildcard && strings.HasSuffix(inner, below) && len(inner) > len(below)
}
