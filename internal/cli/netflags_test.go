package cli

import (
	"net/netip"
	"testing"

	"github.com/smolvm/smolvm"
)

func TestParseNetwork(t *testing.T) {
	for text, want := range map[string]smolvm.Network{
		"user":                       {Mode: smolvm.NetworkUser},
		"none":                       {Mode: smolvm.NetworkNone},
		"tap":                        {Mode: smolvm.NetworkTAP},
		"tap,pool=10.77.0.0/16,open": {Mode: smolvm.NetworkTAP, Pool: netip.MustParsePrefix("10.77.0.0/16"), OpenToVMs: true},
		"bridge=br0":                 {Mode: smolvm.NetworkBridge, Bridge: "br0"},
		"bridge=br0,open":            {Mode: smolvm.NetworkBridge, Bridge: "br0", OpenToVMs: true},
		"":                           {},
		"bridge":                     {},
		"bridge=":                    {},
		"tap=eth0":                   {},
		"TAP":                        {},
		"tap,":                       {},
		"tap,pool":                   {},
		"tap,pool=10.77.0.0":         {},
		"tap,closed":                 {},
	} {
		got, err := parseNetwork(text)
		if want == (smolvm.Network{}) != (err != nil) || err == nil && got != want {
			t.Errorf("%q: %+v, %v, want %+v", text, got, err, want)
		}
	}
}

func TestParseRate(t *testing.T) {
	for text, want := range map[string]int64{
		"10": 10_000_000, "0.5": 500_000, "500K": 500_000, "1.5m": 1_500_000, "1G": 1_000_000_000,
		"": 0, "0": 0, "-1": 0, "K": 0, "1T": 0, "NaN": 0, "Inf": 0, "1e30": 0, "10M5": 0,
	} {
		if got, err := parseRate(text); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d, %v, want %d", text, got, err, want)
		}
	}
}
