package network_test

import (
	"net/netip"
	"testing"

	"github.com/smolvm/smolvm/internal/network/policytest"
)

// The cases that a policy decides by itself, whichever way the guest is connected.
func TestVerdict(t *testing.T) {
	t.Parallel()
	for _, test := range policytest.Cases(t) {
		got := test.Policy.Verdict(test.Flow.Flow)
		if got.Allowed != test.Allowed || got.Number != test.By || test.By != 0 && got.Rule != test.Policy.Rules[test.By-1] {
			t.Errorf("%s: %v (rule %d), want allowed %t by rule %d", test.Name, got, got.Number, test.Allowed, test.By)
		}
		if mapped := test.Flow.Flow; mapped.To.Addr().Is4() {
			mapped.To = netip.AddrPortFrom(netip.AddrFrom16(mapped.To.Addr().As16()), mapped.To.Port())
			if again := test.Policy.Verdict(mapped); again != got {
				t.Errorf("%s: %v if its address is written in IPv6, else %v", test.Name, again, got)
			}
		}
	}
}
