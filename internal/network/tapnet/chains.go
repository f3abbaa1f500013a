package tapnet

import (
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// chain is a chain and its rules.
type chain struct {
	name     string
	kind     nftables.ChainType // empty: it is jumped to
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	rules    []match
}

// addChains adds chains with their rules to a transaction, in place of those of the same names.
func addChains(conn *nftables.Conn, all []chain) {
	added := make([]*nftables.Chain, len(all))
	for i, c := range all {
		added[i] = conn.AddChain(&nftables.Chain{Name: c.name, Table: table(), Type: c.kind, Hooknum: c.hook, Priority: c.priority})
		conn.FlushChain(added[i])
	}
	for i, c := range all {
		for _, r := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table(), Chain: added[i], Exprs: r})
		}
	}
}

// chains returns those that each table has, those that others jump to first.
func chains() []chain {
	v4, v6 := ipv4(), ipv6()
	// Neighbor solicitations and advertisements; the kernel takes none that was forwarded.
	neighbors := v6.icmpType(135, 136)
	return []chain{
		{name: "from_guest", rules: []match{
			rule(inState(expr.CtStateBitINVALID), drop()), // no address would be put in the guest's place
			// Of a guest with a policy, only what answers another guest is forwarded.
			rule(guestIn(expr.MetaKeyIIFNAME, restrictedSet), toGuests(), ofKnownFlow(), isAnswer(), accept()),
			rule(guestIn(expr.MetaKeyIIFNAME, restrictedSet), reject()),
			rule(ofKnownFlow(), accept()),
			rule(v4.guestAddressIn(v4.to, v4.opened, false), accept()),
			rule(v6.guestAddressIn(v6.to, v6.opened, false), accept()),
			rule(v4.addressIn(v4.to, v4.closed), reject()),
			rule(v6.addressIn(v6.to, v6.closed), reject()),
			rule(toGuests(), guestIn(expr.MetaKeyIIFNAME, openSet), guestIn(expr.MetaKeyOIFNAME, openSet), accept()),
			rule(toGuests(), reject()),
			rule(v4.addressIn(v4.to, v4.pooled), reject()),
			rule(v6.addressIn(v6.to, v6.pooled), reject()),
		}},
		{name: "to_guest", rules: []match{
			// What it had before it had a policy has ended.
			rule(guestIn(expr.MetaKeyOIFNAME, restrictedSet), drop()),
			rule(ofKnownFlow(), accept()),
			rule(drop()),
		}},
		{ // After connections are known (-200), before anybody changes destinations (-100).
			name: "prerouting", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityMangle,
			rules: []match{
				rule(notFromGuests(), accept()),
				rule(v4.guestAddressIn(v4.from, v4.sources, true), drop()),
				rule(neighbors, accept()),
				rule(v6.guestAddressIn(v6.from, v6.sources, true), drop()),
				rule(ofKnownFlow(), accept()),
				rule(v4.guestAddressIn(v4.to, v4.gateways, false), accept()), // input decides
				rule(v6.guestAddressIn(v6.to, v6.gateways, false), accept()),
				rule(toKind(unix.RTN_BROADCAST, unix.RTN_MULTICAST), drop()), // and anycast, which is between them
				rule(guestIn(expr.MetaKeyIIFNAME, restrictedSet), accept()),  // its policy decides, see [carryChains]
				rule(toKind(unix.RTN_LOCAL, unix.RTN_LOCAL), reject()),
			},
		},
		{
			name: "input", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookInput, priority: nftables.ChainPriorityFilter,
			rules: []match{
				rule(notFromGuests(), accept()),
				rule(ofKnownFlow(), accept()),
				rule(neighbors, accept()),
				rule(isCarried(), accept()),
				rule(v4.icmpType(v4.echo, v4.echo), accept()),
				rule(v6.icmpType(v6.echo, v6.echo), accept()),
				// Prerouting lets nothing else get here but what is to the gateway.
				rule(guestIn(expr.MetaKeyIIFNAME, namedSet), isQuestion(unix.IPPROTO_UDP), accept()),
				rule(guestIn(expr.MetaKeyIIFNAME, namedSet), isQuestion(unix.IPPROTO_TCP), accept()),
				rule(reject()),
			},
		},
		{
			name: "forward", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter,
			rules: []match{
				rule(fromGuests(), match{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "from_guest"}}),
				rule(toGuests(), match{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "to_guest"}}),
			},
		},
		{
			name: "postrouting", kind: nftables.ChainTypeNAT,
			hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource,
			rules: []match{
				rule(notToGuests(), v4.addressIn(v4.from, v4.guests), match{&expr.Masq{}}),
				rule(notToGuests(), v6.addressIn(v6.from, v6.guests), match{&expr.Masq{}}),
			},
		},
	}
}

// carryChains returns the chains by which flows of guests get to the shims of their VMs. A
// table has them from the first VM on that needs them, as not every kernel has what they take.
//
// A flow that the shim carries is not tracked. So nobody changes its destination before the
// shim has judged it, and the kernel never takes what the guest sends for the answer to a flow
// that the outside has begun, as it would if it had forgotten the flow, and the shim's socket,
// which has the outside's address, were the next to send.
func carryChains() []chain {
	v4, v6 := ipv4(), ipv6()
	const (
		beforeTracking = -300 // NF_IP_PRI_RAW
		// The mark must not be seen by others who compare packets with routes, as firewalld
		// does at 10: it is set after them.
		late = 300
	)
	var untracked, answers, divert, take []match
	for _, v := range []version{v4, v6} {
		for _, protocol := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			untracked = append(untracked, rule(
				carrierOf(expr.MetaKeyIIFNAME), overProtocol(protocol),
				v.guestAddressIn(v.to, v.gateways, true), v.addressNotIn(v.to, v.pooled), match{&expr.Notrack{}}))
			answers = append(answers, rule(
				carrierOf(expr.MetaKeyOIFNAME), overProtocol(protocol),
				v.guestAddressOut(v.from, v.gateways), match{&expr.Notrack{}}))
		}
		divert = append(divert,
			rule(v.guestAddressIn(v.to, v.gateways, false), accept()), // input decides
			// Forwarded, or not: from_guest decides.
			rule(v.addressIn(v.to, v.pooled), ofKnownFlow(), isAnswer(), accept()))
		take = append(take, rule(v.is(), carrierOf(expr.MetaKeyIIFNAME), toCarrier(v), accept()))
	}
	return []chain{
		{name: "take", rules: slices.Concat(
			// A program is to try its next address at once.
			[]match{
				rule(beginsTCP(), notToKind(unix.RTN_LOCAL), toNoRoute(), reject()),
				rule(overProtocol(unix.IPPROTO_UDP), notToKind(unix.RTN_LOCAL), toNoRoute(), reject()),
			},
			take,
			// Of other protocols, or nobody takes it: the shim may have been killed.
			[]match{rule(guestIn(expr.MetaKeyIIFNAME, restrictedSet), reject())},
		)},
		{
			name: "divert", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(late),
			rules: slices.Concat(
				[]match{rule(notFromGuests(), accept()), rule(v6.icmpType(135, 136), accept())},
				divert,
				[]match{
					rule(carrierOf(expr.MetaKeyIIFNAME), match{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "take"}}),
					rule(guestIn(expr.MetaKeyIIFNAME, restrictedSet), reject()),
				},
			),
		},
		{
			name: "untracked", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(beforeTracking), rules: untracked,
		},
		{
			name: "untracked_answers", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityRef(beforeTracking), rules: answers,
		},
	}
}
