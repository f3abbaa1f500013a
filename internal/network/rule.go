package network

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm"
)

// Rule allows or denies flows. Its text, and its form in JSON, is
//
//	ACTION TARGET[:PORTS][/PROTOCOL]
//
//	ACTION    allow, deny
//	TARGET    *                everything
//	          example.com      this name, and none below it
//	          *.example.com    all names below it, at any depth, and not itself
//	          192.0.2.1        an address; IPv6 in brackets: [2001:db8::1]
//	          192.0.2.0/24     a network; [2001:db8::/32]
//	          @host            the host itself
//	          @vms             networks of VMs
//	PORTS     443 or 8000-8999, both ends included
//	PROTOCOL  tcp, udp, icmp
//
// as in "allow example.com:443/tcp". Without ports a rule is about all, and one with ports is
// not about ICMP; without a protocol it is about all.
type Rule struct {
	Action Action
	// One of these says what the rule is about; none: everything. Domain is lower-case
	// ASCII, without a dot at its end; CIDR has no bits beyond its length.
	Domain string
	CIDR   netip.Prefix
	Place  Place
	// Ports are those of the destination. Zero: all.
	Ports Ports
	// Protocol is TCP, UDP or [ICMP]. Empty: all.
	Protocol smolvm.Protocol
}

// Action is what a rule does with the flows that it matches.
type Action string

// The actions.
const (
	Allow Action = "allow"
	Deny  Action = "deny"
)

// Place is a destination that is known by what is there, as its addresses come and go.
type Place string

// The places.
const (
	PlaceHost Place = "@host"
	PlaceVMs  Place = "@vms"
)

// Ports are a range of ports, both ends included.
type Ports struct{ First, Last uint16 }

func (p Ports) all() bool { return p == Ports{} }

func (p Ports) includes(other Ports) bool {
	return p.all() || !other.all() && p.First <= other.First && other.Last <= p.Last
}

func (p Ports) overlaps(other Ports) bool {
	return p.all() || other.all() || p.First <= other.Last && other.First <= p.Last
}

// maxRule is how long the text of a rule may be, in bytes: twice what the longest has.
const maxRule = 600

// ParseRule reads the text of a rule.
func ParseRule(text string) (Rule, error) {
	fail := func(format string, args ...any) (Rule, error) {
		return Rule{}, fmt.Errorf("rule %q: %w", text, fmt.Errorf(format, args...))
	}
	if len(text) > maxRule {
		return Rule{}, fmt.Errorf("a rule of %d bytes is too long; %d are allowed", len(text), maxRule)
	}
	fields := strings.Fields(text)
	if len(fields) != 2 {
		return fail("it is not of the form ACTION TARGET[:PORTS][/PROTOCOL], as in %q", "allow example.com:443/tcp")
	}
	r := Rule{Action: Action(fields[0])}
	if r.Action != Allow && r.Action != Deny {
		return fail("%q is no action; use %s or %s", r.Action, Allow, Deny)
	}
	rest, protocol, ok := cutProtocol(fields[1])
	if ok {
		if r.Protocol = smolvm.Protocol(protocol); r.Protocol != smolvm.TCP && r.Protocol != smolvm.UDP && r.Protocol != ICMP {
			return fail("%q is no protocol; use %s, %s or %s", protocol, smolvm.TCP, smolvm.UDP, ICMP)
		}
	}
	target, ports, ok, err := cutPorts(rest)
	if err == nil && ok {
		r.Ports, err = parsePorts(ports)
	}
	if err == nil {
		err = r.parseTarget(target)
	}
	if err != nil {
		return fail("%w", err)
	}
	if r.Protocol == ICMP && !r.Ports.all() {
		return fail("ICMP has no ports; leave %q out", ":"+ports)
	}
	return r, nil
}

// cutProtocol cuts "/tcp" off. What follows the last slash is a protocol if it is no number,
// as that of a network is.
func cutProtocol(text string) (rest, protocol string, ok bool) {
	i := strings.LastIndexByte(text, '/')
	if i < 0 || strings.ContainsAny(text[i:], "0123456789]") {
		return text, "", false
	}
	return text[:i], text[i+1:], true
}

// cutPorts cuts ":443" off.
func cutPorts(text string) (target, ports string, ok bool, err error) {
	if inside, bracket := strings.CutPrefix(text, "["); bracket {
		inside, after, closed := strings.Cut(inside, "]")
		if !closed {
			return "", "", false, errors.New("the bracket is not closed")
		}
		ports, ok = strings.CutPrefix(after, ":")
		if !ok && after != "" {
			return "", "", false, fmt.Errorf("%q follows the bracket; ports begin with a colon", after)
		}
		if !strings.Contains(inside, ":") {
			return "", "", false, fmt.Errorf("[%s] is no address of IPv6; only these are in brackets", inside)
		}
		return inside, ports, ok, nil
	}
	if strings.Count(text, ":") > 1 {
		return "", "", false, fmt.Errorf("%q has several colons; put an address of IPv6 in brackets, as in [2001:db8::1]:443", text)
	}
	target, ports, ok = strings.Cut(text, ":")
	return target, ports, ok, nil
}

func parsePorts(text string) (Ports, error) {
	first, last, isRange := strings.Cut(text, "-")
	if !isRange {
		last = first
	}
	from, firstErr := strconv.ParseUint(first, 10, 16)
	to, lastErr := strconv.ParseUint(last, 10, 16)
	switch {
	case firstErr != nil, lastErr != nil, from == 0, to == 0:
		return Ports{}, fmt.Errorf("%q is no port, nor a range of them; ports are 1 to 65535", text)
	case from > to:
		return Ports{}, fmt.Errorf("the ports %q end before they begin", text)
	}
	return Ports{uint16(from), uint16(to)}, nil
}

func (r *Rule) parseTarget(text string) (err error) {
	switch {
	case text == "*":
		return nil
	case text == string(PlaceHost), text == string(PlaceVMs):
		r.Place = Place(text)
		return nil
	case strings.HasPrefix(text, "@"):
		return fmt.Errorf("%q is no place; use %s or %s", text, PlaceHost, PlaceVMs)
	case strings.ContainsAny(text, "/:") || looksLikeIPv4(normalName(text)):
		r.CIDR, err = parseCIDR(text)
		return err
	}
	r.Domain, err = parseDomain(text)
	return err
}

// looksLikeIPv4 reports whether the last label is a number, as that of no name is (RFC 3696,
// section 2).
func looksLikeIPv4(text string) bool {
	last := text[strings.LastIndexByte(text, '.')+1:]
	return last != "" && strings.Trim(last, "0123456789") == ""
}

func parseCIDR(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if !strings.Contains(text, "/") {
		var addr netip.Addr
		if addr, err = netip.ParseAddr(text); err == nil {
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
	}
	switch {
	case strings.Contains(text, "%"):
		return netip.Prefix{}, fmt.Errorf("%q has a zone, which means nothing in a guest", text)
	case err != nil:
		return netip.Prefix{}, fmt.Errorf("%q is neither an address, nor a network, nor a name", text)
	case prefix.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%q is an IPv4 address in IPv6; write it as IPv4", text)
	case prefix != prefix.Masked():
		return netip.Prefix{}, fmt.Errorf("%q has bits beyond its length; write %s for the network", text, prefix.Masked())
	}
	return prefix, nil
}

// Longest name and label of DNS, in bytes (RFC 1035, section 2.3.4).
const maxDomain, maxLabel = 253, 63

// parseDomain checks a name, with or without "*." before it.
func parseDomain(text string) (string, error) {
	domain := normalName(text)
	name := strings.TrimPrefix(domain, "*.")
	switch {
	case name == "":
		return "", fmt.Errorf("%q is no name", text)
	case strings.Contains(name, "*"):
		return "", fmt.Errorf("%q has a wildcard that stands for no whole first label; write *.example.com", text)
	case len(name) > maxDomain:
		return "", fmt.Errorf("a name of %d bytes is too long; %d are allowed", len(name), maxDomain)
	}
	for label := range strings.SplitSeq(name, ".") {
		switch {
		case label == "":
			return "", fmt.Errorf("%q has an empty label", text)
		case len(label) > maxLabel:
			return "", fmt.Errorf("%q has a label of more than %d bytes", text, maxLabel)
		case strings.ContainsFunc(label, func(c rune) bool { return c >= 0x80 }):
			return "", fmt.Errorf("%q is not in ASCII; write it as DNS has it, as in xn--bcher-kva.example", text)
		case label[0] == '-', label[len(label)-1] == '-',
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "":
			return "", fmt.Errorf("%q is no label of a name; it has letters, digits and, within, hyphens", label)
		}
	}
	return domain, nil
}

// String returns the rule's text, which [ParseRule] reads.
func (r Rule) String() string {
	target := "*"
	switch {
	case r.Place != "":
		target = string(r.Place)
	case r.CIDR.IsValid():
		target = r.CIDR.String()
		if r.CIDR.IsSingleIP() {
			target = r.CIDR.Addr().String()
		}
		if r.CIDR.Addr().Is6() {
			target = "[" + target + "]"
		}
	case r.Domain != "":
		target = r.Domain
	}
	text := string(r.Action) + " " + target
	if !r.Ports.all() {
		text += ":" + strconv.Itoa(int(r.Ports.First))
		if r.Ports.Last != r.Ports.First {
			text += "-" + strconv.Itoa(int(r.Ports.Last))
		}
	}
	if r.Protocol != "" {
		text += "/" + string(r.Protocol)
	}
	return text
}

// MarshalText implements [encoding.TextMarshaler]. A rule that [ParseRule] does not return is
// an error.
func (r Rule) MarshalText() ([]byte, error) {
	text := r.String()
	switch read, err := ParseRule(text); {
	case err != nil:
		return nil, err
	case read != r:
		return nil, fmt.Errorf("rule %q: it says more than its text: %+v", text, r)
	}
	return []byte(text), nil
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (r *Rule) UnmarshalText(text []byte) (err error) {
	*r, err = ParseRule(string(text))
	return err
}

// hasPort reports whether a flow's protocol and port are those of the rule. Where the flow's
// may be any, those of an allowing rule are, and those of a denying rule are not unless it
// denies all.
func (r Rule) hasPort(f Flow) bool {
	allows := r.Action == Allow
	if r.Protocol != "" && r.Protocol != f.Protocol && (f.Protocol != "" || !allows) {
		return false
	}
	switch port := f.To.Port(); {
	case r.Ports.all():
		return true
	case f.Protocol == ICMP:
		return false
	case port == 0:
		return allows
	default:
		return r.Ports.First <= port && port <= r.Ports.Last
	}
}

// matches reports whether a flow, as v shows it, is to the rule's target.
func (r Rule) matches(f Flow, v view) bool {
	switch {
	case r.Place == PlaceHost:
		return f.Host
	case r.Place == PlaceVMs:
		return f.VMs
	case r.CIDR.IsValid():
		return r.CIDR.Contains(f.To.Addr())
	case r.Domain == "":
		return true
	case v.hidden:
		return r.Action == Deny // it may be that name
	case r.Action == Deny:
		return r.hasName(v.names)
	}
	return v.proved && r.hasName(v.names) && isPublic(f.To.Addr())
}

// hasName reports whether the rule is about one of some names, or about all.
func (r Rule) hasName(names []string) bool {
	below, wildcard := strings.CutPrefix(r.Domain, "*")
	return r.Domain == "" || slices.ContainsFunc(names, func(name string) bool {
		return name == r.Domain || wildcard && len(name) > len(below) && strings.HasSuffix(name, below)
	})
}

// question returns what a rule says of questions for names; ok is false if it says nothing. A
// rule that denies a part of the flows to a name leaves the name known.
func (r Rule) question() (asks Rule, ok bool) {
	if r.CIDR.IsValid() || r.Place != "" || r.Action == Deny && (!r.Ports.all() || r.Protocol != "") {
		return Rule{}, false
	}
	return Rule{Action: r.Action, Domain: r.Domain}, true
}
