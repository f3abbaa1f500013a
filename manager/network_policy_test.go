package manager_test

import (
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/testenv"
)

// A guest on a TAP interface reaches what its policy lets it reach, by name, from its start on and
// when the policy changes.
func TestNetworkTAPWithPolicy(t *testing.T) {
	testenv.RequireQEMU(t)
	testenv.Image(t)
	if !nettest.InOwnNetwork(t) {
		return
	}
	outside(t)
	m := openOnTAP(t, false)
	const closed = ""
	fetch := func(from string) string { return sh(t, m, "bound", "("+fetchFrom(from)+") 2>/dev/null || true") }
	vm := mustRun(t, m, smolvm.VMConfig{
		ID: "bound", Network: smolvm.Network{Mode: smolvm.NetworkTAP},
		Egress: &smolvm.EgressPolicy{Default: "deny", Rules: []string{"allow " + outsideName + ":80/tcp"}},
	})
	if len(vm.Start.Warnings) > 0 {
		t.Errorf("warnings: %q", vm.Start.Warnings)
	}
	open := "from " + theHost
	for _, test := range []struct{ what, from, want string }{
		{"an address, before anybody asked", outsideAddr, closed},
		{"the name", outsideName, open},
	} {
		if got := fetch(test.from); got != test.want {
			t.Errorf("%s: %q, want %q", test.what, got, test.want)
		}
	}
	for _, test := range []struct {
		policy smolvm.EgressPolicy
		want   string
	}{
		{smolvm.EgressPolicy{Default: "deny"}, closed},
		{smolvm.EgressPolicy{Default: "deny", Rules: []string{"allow " + outsideAddr}}, open},
		{smolvm.EgressPolicy{}, open},
		{smolvm.EgressPolicy{Default: "deny"}, closed},
	} {
		if _, err := m.SetEgress(t.Context(), "bound", test.policy); err != nil {
			t.Fatal(err)
		}
		if got := fetch(outsideAddr); got != test.want {
			t.Errorf("%v: %q, want %q", test.policy, got, test.want)
		}
	}
	ensure(t, m.Delete(t.Context(), "bound", smolvm.DeleteOptions{}))
	if left := leftOnHost(t); left != nothingLeft {
		t.Errorf("left on the host: %s", left)
	}
}
