// Package learn finds the smallest egress policy that allows what a VM's guest was seen to do.
package learn

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/net/publicsuffix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// Learner learns from the records of a flow log, which it is given in their order.
type Learner struct {
	opts  smolvm.LearnOptions
	open  map[int64]smolvm.FlowRecord // of the run
	flows map[string]network.Flow     // what is needed, each once
}

// New returns a learner.
func New(opts smolvm.LearnOptions) *Learner {
	return &Learner{opts: opts, open: map[int64]smolvm.FlowRecord{}, flows: map[string]network.Flow{}}
}

// Add takes the next record.
func (l *Learner) Add(r smolvm.FlowRecord) {
	switch r.Kind {
	case smolvm.FlowStart:
		l.endRun()
	case smolvm.FlowTCP, smolvm.FlowUDP:
	default:
		return
	}
	switch r.Event {
	case smolvm.FlowOpen, smolvm.FlowFail:
		l.open[r.Flow] = r
	case smolvm.FlowClose: // by then the name that it states is known
		delete(l.open, r.Flow)
		l.need(r)
	case smolvm.FlowDeny:
		delete(l.open, r.Flow)
		// A second rule is as good as none where something is closed always.
		if l.opts.Denied && r.Closed == "" {
			l.need(r)
		}
	}
}

func (l *Learner) endRun() {
	for _, r := range l.open {
		l.need(r)
	}
	clear(l.open)
}

// need notes a flow that is to be allowed.
func (l *Learner) need(r smolvm.FlowRecord) {
	to, err := netip.ParseAddrPort(r.Address)
	if err != nil {
		return
	}
	f := network.Flow{
		Protocol: smolvm.Protocol(r.Kind), To: to,
		Host: r.Place == string(network.ClosedHost), VMs: r.Place == string(network.ClosedVMs),
		Names: network.Names{Asked: r.AskedNames, SNI: r.SNI, Host: r.HTTPHost, Hidden: r.HiddenName},
	}
	l.flows[fmt.Sprintf("%+v", f)] = f
}

// Policy returns the smallest policy that allows what is needed: rules with names where names are
// known, else with addresses.
func (l *Learner) Policy() smolvm.LearnedEgress {
	l.endRun()
	keys := slices.Sorted(maps.Keys(l.flows))
	learned := smolvm.LearnedEgress{Flows: len(keys), Uncovered: []string{}}
	var left []need
	for _, key := range keys {
		if ways := waysFor(l.flows[key]); len(ways) > 0 {
			left = append(left, need{l.flows[key], ways})
		} else {
			learned.Uncovered = append(learned.Uncovered, uncovered(l.flows[key]))
		}
	}
	rules := merge(cover(left))
	if l.opts.Wildcards {
		rules = merge(widen(rules))
	}
	learned.Policy.Default = smolvm.EgressDeny
	if len(rules) > network.MaxRules {
		learned.Uncovered = append(learned.Uncovered, fmt.Sprintf("what %d rules beyond the %d that a policy may have would allow", len(rules)-network.MaxRules, network.MaxRules))
		rules = rules[:network.MaxRules]
	}
	for _, rule := range rules {
		learned.Policy.Rules = append(learned.Policy.Rules, rule.String())
	}
	return learned
}

// uncovered says why no rule allows a flow.
func uncovered(f network.Flow) string {
	v := network.Policy{Default: network.DefaultDeny, Rules: []network.Rule{byAddress(f)}}.Verdict(f)
	return fmt.Sprintf("%s/%s: %s", f.To, f.Protocol, v)
}

// need is a flow, and the ways to allow it, the best first.
type need struct {
	flow network.Flow
	ways []way
}

// way is rules that allow a flow together.
type way []network.Rule

func (w way) key() string { return fmt.Sprint([]network.Rule(w)) }

// waysFor returns the ways to allow a flow, each of which the policy itself has confirmed.
func waysFor(f network.Flow) []way {
	names := func(names ...string) way {
		var w way
		for _, name := range names {
			// As users write it, so that what is no name of a rule is none here. The guest has
			// chosen it: it may ask for the name "*.com".
			rule, err := network.ParseRule("allow " + name)
			if err != nil || rule.Domain == "" || strings.Contains(rule.Domain, "*") {
				return nil
			}
			rule.Ports, rule.Protocol = portOf(f), f.Protocol
			w = append(w, rule)
		}
		return w
	}
	var stated []string
	for _, name := range []string{f.Names.SNI, withoutPort(f.Names.Host)} {
		if name = strings.ToLower(strings.TrimSuffix(name, ".")); name != "" && !slices.Contains(stated, name) {
			stated = append(stated, name)
		}
	}
	candidates := []way{names(stated...)}
	if len(stated) == 0 {
		for _, name := range slices.Sorted(slices.Values(f.Names.Asked)) {
			candidates = append(candidates, names(name))
		}
	}
	if place := placeOf(f); place != "" {
		candidates = append(candidates, way{{Action: network.Allow, Place: place, Ports: portOf(f), Protocol: f.Protocol}})
	}
	candidates = append(candidates, way{byAddress(f)})
	return slices.DeleteFunc(candidates, func(w way) bool {
		return len(w) == 0 || !network.Policy{Default: network.DefaultDeny, Rules: w}.Verdict(f).Allowed
	})
}

func portOf(f network.Flow) network.Ports {
	return network.Ports{First: f.To.Port(), Last: f.To.Port()}
}

func placeOf(f network.Flow) network.Place {
	switch {
	case f.Host:
		return network.PlaceHost
	case f.VMs:
		return network.PlaceVMs
	}
	return ""
}

func byAddress(f network.Flow) network.Rule {
	addr := f.To.Addr().Unmap()
	return network.Rule{Action: network.Allow, CIDR: netip.PrefixFrom(addr, addr.BitLen()), Ports: portOf(f), Protocol: f.Protocol}
}

func withoutPort(host string) string {
	name, _, _ := strings.Cut(host, ":")
	return name
}

// cover returns rules that allow all flows. Of several names that a flow may have had, the one is
// taken that serves the most flows.
func cover(left []need) []network.Rule {
	var rules []network.Rule
	have := map[network.Rule]bool{}
	take := func(w way) {
		for _, rule := range w {
			if !have[rule] {
				have[rule] = true
				rules = append(rules, rule)
			}
		}
	}
	left = slices.DeleteFunc(left, func(n need) bool {
		sure := len(n.ways) == 1 || n.flow.Names.SNI != "" || n.flow.Names.Host != ""
		if sure {
			take(n.ways[0])
		}
		return sure
	})
	for len(left) > 0 {
		left = slices.DeleteFunc(left, func(n need) bool {
			return slices.ContainsFunc(n.ways, func(w way) bool {
				return !slices.ContainsFunc(w, func(r network.Rule) bool { return !have[r] })
			})
		})
		if len(left) == 0 {
			break
		}
		take(mostUsed(left))
	}
	return rules
}

// mostUsed returns the way by name that serves the most flows, or the first that there is.
func mostUsed(left []need) way {
	count := map[string]int{}
	var best way
	for _, n := range left {
		for _, w := range n.ways {
			count[w.key()]++
		}
	}
	better := func(w way) int {
		return cmp.Or(
			cmp.Compare(boolInt(w[0].Domain != ""), boolInt(best[0].Domain != "")),
			cmp.Compare(count[w.key()], count[best.key()]),
			-strings.Compare(w.key(), best.key()),
		)
	}
	for _, n := range left {
		for _, w := range n.ways {
			if best == nil || better(w) > 0 {
				best = w
			}
		}
	}
	return best
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// target is what a rule is about, without its ports and protocol.
type target struct {
	domain string
	cidr   netip.Prefix
	place  network.Place
}

// merge makes one rule of those that differ by neighboring ports, and of those for TCP and UDP.
// It returns them in a fixed order.
func merge(rules []network.Rule) []network.Rule {
	ports := map[target]map[smolvm.Protocol][]network.Ports{}
	for _, r := range rules {
		t := target{r.Domain, r.CIDR, r.Place}
		if ports[t] == nil {
			ports[t] = map[smolvm.Protocol][]network.Ports{}
		}
		protocols := []smolvm.Protocol{r.Protocol}
		if r.Protocol == "" {
			protocols = []smolvm.Protocol{smolvm.TCP, smolvm.UDP}
		}
		for _, p := range protocols {
			ports[t][p] = append(ports[t][p], r.Ports)
		}
	}
	var merged []network.Rule
	for t, byProtocol := range ports {
		add := func(p network.Ports, protocol smolvm.Protocol) {
			merged = append(merged, network.Rule{Action: network.Allow, Domain: t.domain, CIDR: t.cidr, Place: t.place, Ports: p, Protocol: protocol})
		}
		tcp, udp := join(byProtocol[smolvm.TCP]), join(byProtocol[smolvm.UDP])
		for _, p := range tcp {
			if slices.Contains(udp, p) {
				add(p, "")
			} else {
				add(p, smolvm.TCP)
			}
		}
		for _, p := range udp {
			if !slices.Contains(tcp, p) {
				add(p, smolvm.UDP)
			}
		}
	}
	slices.SortFunc(merged, func(a, b network.Rule) int {
		return cmp.Or(
			cmp.Compare(boolInt(a.Domain == ""), boolInt(b.Domain == "")),
			strings.Compare(a.Domain, b.Domain), a.CIDR.Addr().Compare(b.CIDR.Addr()), strings.Compare(string(a.Place), string(b.Place)),
			cmp.Compare(a.Ports.First, b.Ports.First), strings.Compare(string(a.Protocol), string(b.Protocol)),
		)
	})
	return merged
}

// join joins ranges of ports that overlap or follow each other. But those of name servers stay
// alone: a rule opens them only if it is about nothing else.
func join(ranges []network.Ports) []network.Ports {
	slices.SortFunc(ranges, func(a, b network.Ports) int { return cmp.Compare(a.First, b.First) })
	alone := func(p network.Ports) bool { return p.First == p.Last && (p.First == 53 || p.First == 853) }
	var joined []network.Ports
	for _, p := range ranges {
		i := len(joined) - 1
		if i >= 0 && joined[i] == p {
			continue
		}
		if i < 0 || alone(joined[i]) || alone(p) || int(p.First) > int(joined[i].Last)+1 {
			joined = append(joined, p)
			continue
		}
		joined[i].Last = max(joined[i].Last, p.Last)
	}
	return joined
}

// widen replaces names below the same registered domain, of which there are several with the same
// ports and protocol, by a wildcard.
func widen(rules []network.Rule) []network.Rule {
	wildcard := func(r network.Rule) (network.Rule, bool) {
		registered, err := publicsuffix.EffectiveTLDPlusOne(r.Domain)
		if err != nil || registered == r.Domain || strings.HasPrefix(r.Domain, "*") {
			return r, false
		}
		r.Domain = "*." + registered
		return r, true
	}
	count := map[network.Rule]int{}
	for _, r := range rules {
		if wide, ok := wildcard(r); ok {
			count[wide]++
		}
	}
	widened := make([]network.Rule, 0, len(rules))
	for _, r := range rules {
		if wide, ok := wildcard(r); ok && count[wide] > 1 {
			r = wide
		}
		if !slices.Contains(widened, r) {
			widened = append(widened, r)
		}
	}
	return widened
}
