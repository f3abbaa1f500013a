package session

import (
	"log/slog"
	"testing"

	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
)

// quietNetwork is a network without any domains to search.
type quietNetwork struct{ withoutPolicies }

func (quietNetwork) Search() []string { return nil }

// The guest's MTU is that of the network that it has, also when the session goes on as that of
// a VM which was to have another.
func TestHelloMTU(t *testing.T) {
	spec := func(mtu int) shim.Spec {
		return shim.Spec{Network: &network.Config{MTU: mtu}, Hello: &wire.Hello{Network: &wire.Network{MAC: "02:00:00:00:00:02"}}}
	}
	attach := func(network.Config, func(string)) (network.Attachment, error) { return quietNetwork{}, nil }
	s := New(spec(9000), Options{Attach: attach, Log: slog.New(slog.DiscardHandler)})
	if err := s.Connect(); err != nil {
		t.Fatal(err)
	}
	for _, claimed := range []bool{false, true} {
		if claimed {
			s.Claim(spec(network.UserMTU), "")
		}
		if got := s.hello().Network.MTU; got != 9000 {
			t.Errorf("claimed %t: the guest is told an MTU of %d, and the network's is 9000", claimed, got)
		}
	}
}
