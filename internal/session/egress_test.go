package session

import (
	"errors"
	"log/slog"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
)

// withoutPolicies is a network that enforces none.
type withoutPolicies struct{ network.Attachment }

func (withoutPolicies) SetGuestMAC(string) error { return nil }

// A network that can't enforce a policy gets no VM that has one: neither one that is started,
// nor one that is claimed.
func TestPolicyNobodyEnforces(t *testing.T) {
	for _, test := range []struct {
		name   string
		egress *network.Egress
	}{
		{"no policy", nil},
		{"a policy", &network.Egress{Policy: network.Policy{Default: network.DefaultDeny}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			attach := func(network.Config, func(string)) (network.Attachment, error) { return withoutPolicies{}, nil }
			s := New(shim.Spec{Network: &network.Config{}}, Options{Attach: attach, Log: slog.New(slog.DiscardHandler)})
			if err := s.Connect(); err != nil {
				t.Fatal(err)
			}
			s.spec.Network.Egress = test.egress
			for call, err := range map[string]error{"Connect": s.Connect(), "Reconnect": s.Reconnect()} {
				if errors.Is(err, smolvm.ErrUnsupported) != (test.egress != nil) || test.egress == nil && err != nil {
					t.Errorf("%s: %v", call, err)
				}
			}
		})
	}
}
