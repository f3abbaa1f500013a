package usernet

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/smolvm/smolvm/internal/network"
)

// errRefused matches the errors of what a guest may not do.
var errRefused = errors.New("the guest may not connect to this address")

// policyOf returns what the guest of a network may reach.
func policyOf(config Config) network.Policy {
	var p network.Policy
	for _, addr := range config.Metadata {
		addr = addr.Unmap()
		p.Rules = append(p.Rules, network.Rule{Action: network.Allow, CIDR: netip.PrefixFrom(addr, addr.BitLen())})
	}
	return p
}

// judge returns an error that matches [errRefused] if the guest may not have a flow. What
// connects the guest, and what tells it addresses that only the host knows, both ask here.
func (o *outbound) judge(f network.Flow) error {
	f.VMs = o.inside.Contains(f.To.Addr().Unmap())
	if v := o.policy.Verdict(f); !v.Allowed {
		return fmt.Errorf("%s: %w: %s", f.To, errRefused, v)
	}
	return nil
}
