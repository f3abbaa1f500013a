package outbound

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/smolvm/smolvm/internal/network"
)

// ErrRefused matches the errors of what a guest may not do.
var ErrRefused = errors.New("the guest may not connect to this address")

// errHost matches those of addresses that are known to be the host's, which a rule about the
// host opens. What is not known, no rule opens.
var errHost = errors.New("it is the host's")

// policyOf returns what the guest of a network may reach by an egress policy. The metadata
// services that are configured come last, so that the numbers of rules are those of the policy.
func policyOf(metadata []netip.Addr, p network.Policy) *network.Policy {
	p.Rules = slices.Clone(p.Rules)
	for _, addr := range metadata {
		addr = addr.Unmap()
		p.Rules = append(p.Rules, network.Rule{Action: network.Allow, CIDR: netip.PrefixFrom(addr, addr.BitLen())})
	}
	return &p
}

// SetEgress implements [network.EgressSetter].
func (o *Outbound) SetEgress(egress network.Egress) error {
	o.mu.Lock()
	if egress.Revision < o.revision {
		defer o.mu.Unlock()
		return fmt.Errorf("set the egress policy: revision %d is older than %d, which is in force", egress.Revision, o.revision)
	}
	o.revision = egress.Revision
	o.policy.Store(policyOf(o.config.Metadata, egress.Policy))
	conns, flows := make([]*tcpFlow, 0, len(o.tcp)), make([]*flow, 0, len(o.flows))
	for f := range o.tcp {
		conns = append(conns, f)
	}
	for f := range o.flows {
		flows = append(flows, f)
	}
	o.mu.Unlock()
	for _, f := range conns {
		f.recheck()
	}
	for _, f := range flows {
		f.recheck()
	}
	return nil
}

// EgressRevision implements [network.EgressSetter].
func (o *Outbound) EgressRevision() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.revision
}

// Policy returns the policy in force, with the metadata services that are configured.
func (o *Outbound) Policy() *network.Policy { return o.policy.Load() }

// MayKnow reports whether the guest may be told of an address that only the host knows.
func (o *Outbound) MayKnow(name string, addr netip.Addr) bool {
	own, err := isOwn(addr)
	return o.judge(network.Flow{
		To:    netip.AddrPortFrom(addr, 0),
		Names: network.Names{Asked: []string{name}},
		Host:  own || err != nil,
	}) == nil
}

// verdict returns what the policy in force says of a flow.
func (o *Outbound) verdict(f network.Flow) network.Verdict {
	f.VMs = f.VMs || o.isInside(f.To.Addr())
	return o.policy.Load().Verdict(f)
}

// isInside reports whether an address is in a network of VMs.
func (o *Outbound) isInside(addr netip.Addr) bool {
	addr = addr.Unmap()
	return slices.ContainsFunc(o.config.Inside, func(inside netip.Prefix) bool { return inside.Contains(addr) })
}

// judge returns an error that matches [ErrRefused] if the guest may not have a flow. What
// connects the guest, and what tells it addresses that only the host knows, both ask here.
func (o *Outbound) judge(f network.Flow) error {
	if v := o.verdict(f); !v.Allowed {
		return refusal(f, v)
	}
	return nil
}

func refusal(f network.Flow, v network.Verdict) error {
	return fmt.Errorf("%s: %w: %s", f.To, ErrRefused, v)
}
