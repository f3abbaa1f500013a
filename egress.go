package smolvm

import "slices"

// EgressPolicy says what a guest may reach. The zero value allows all but what is closed
// always: the host itself, other VMs, link-local addresses, and metadata services of clouds.
type EgressPolicy struct {
	// Default decides where no rule does. Empty: [EgressAllow].
	Default EgressDefault `json:"default,omitempty"`
	// Rules are tried in order; the first one that matches decides. Each is
	//
	//	ACTION TARGET[:PORTS][/PROTOCOL]
	//
	//	ACTION    allow, deny
	//	TARGET    *                everything but what is closed always
	//	          example.com      this name, and none below it
	//	          *.example.com    all names below it, and not itself
	//	          192.0.2.1        an address; IPv6 in brackets: [2001:db8::1]
	//	          192.0.2.0/24     a network
	//	          @host            the host itself
	//	          @vms             networks of VMs
	//	PORTS     443, or 8000-8999
	//	PROTOCOL  tcp, udp, icmp
	//
	// as in "allow example.com:443/tcp". docs/networking.md says how names are judged.
	Rules []string `json:"rules,omitempty"`
}

// EgressDefault is what becomes of flows that no rule of a policy matches.
type EgressDefault string

// The defaults of a policy.
const (
	// EgressAllow lets them out.
	EgressAllow EgressDefault = "allow"
	// EgressDeny lets nothing out, and resolves no name but those that a rule allows.
	EgressDeny EgressDefault = "deny"
	// EgressDNSOnly lets nothing out, and resolves all names that no rule denies.
	EgressDNSOnly EgressDefault = "dns-only"
)

// Clone returns a copy that shares nothing with p; nil for nil.
func (p *EgressPolicy) Clone() *EgressPolicy {
	if p == nil {
		return nil
	}
	return &EgressPolicy{Default: p.Default, Rules: slices.Clone(p.Rules)}
}

// EgressState is the egress policy of a VM at one time.
type EgressState struct {
	Policy EgressPolicy `json:"policy"`
	// Revision grows by one with each change. Zero: the VM was never given a policy.
	Revision int64 `json:"revision"`
	// Within is the policy that no policy of this VM may go beyond, as it is a fork or was
	// restored from a snapshot; nil: there is none.
	Within *EgressPolicy `json:"within,omitempty"`
}

// EgressVerdict is what a policy says of a destination.
type EgressVerdict struct {
	// Destination is what was asked for.
	Destination string `json:"destination"`
	Allowed     bool   `json:"allowed"`
	// Number is that of the rule that decides, from 1 on, and Rule that rule. Zero: no rule
	// does, but what is closed always, or the default.
	Number int    `json:"number,omitempty"`
	Rule   string `json:"rule,omitempty"`
	// Reason says what decides, for a person.
	Reason string `json:"reason"`
	// Revision of the policy.
	Revision int64 `json:"revision"`
}
