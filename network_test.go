package smolvm_test

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/smolvm/smolvm"
)

func TestValidateNetwork(t *testing.T) {
	pool := netip.MustParsePrefix("10.77.0.0/16")
	forwards := []smolvm.PortForward{{GuestPort: 80}}
	for name, test := range map[string]struct {
		config smolvm.VMConfig
		bad    []string
	}{
		"nothing asked for":    {smolvm.VMConfig{}, nil},
		"user with rates":      {smolvm.VMConfig{Network: smolvm.Network{ReceiveBitsPerSecond: 1e6, SendBitsPerSecond: smolvm.MinNetworkRate}}, nil},
		"tap":                  {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkTAP, Pool: pool, OpenToVMs: true}, PortForwards: forwards, Ready: smolvm.ReadySSH}, nil},
		"bridge":               {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkBridge, Bridge: "br-0.1", OpenToVMs: true, SendBitsPerSecond: 1e6}}, nil},
		"none":                 {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkNone}}, nil},
		"unknown mode":         {smolvm.VMConfig{Network: smolvm.Network{Mode: "TAP", Bridge: "br0"}}, []string{"network.mode"}},
		"bridge without name":  {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkBridge}}, []string{"network.bridge"}},
		"bridge with a path":   {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkBridge, Bridge: "../br0"}}, []string{"network.bridge"}},
		"long name":            {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkBridge, Bridge: "sixteen-letters-"}}, []string{"network.bridge"}},
		"name without bridge":  {smolvm.VMConfig{Network: smolvm.Network{Bridge: "br0"}}, []string{"network.bridge"}},
		"pool and open":        {smolvm.VMConfig{Network: smolvm.Network{Pool: pool, OpenToVMs: true}}, []string{"network.pool", "network.open_to_vms"}},
		"pool of a bridge":     {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkBridge, Bridge: "br0", Pool: pool}}, []string{"network.pool"}},
		"forwards to a bridge": {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkBridge, Bridge: "br0"}, PortForwards: forwards}, []string{"port_forwards"}},
		"forwards to nowhere": {smolvm.VMConfig{
			Network: smolvm.Network{Mode: smolvm.NetworkNone}, PortForwards: forwards, SSHHostAddr: netip.IPv4Unspecified(), Ready: smolvm.ReadySSH,
		}, []string{"port_forwards", "ssh_host_addr", "ready"}},
		"rates": {smolvm.VMConfig{Network: smolvm.Network{ReceiveBitsPerSecond: smolvm.MinNetworkRate - 1, SendBitsPerSecond: -1}},
			[]string{"network.receive_bits_per_second", "network.send_bits_per_second"}},
		"a rate of nothing": {smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkNone, SendBitsPerSecond: 1e6}}, []string{"network.send_bits_per_second"}},
	} {
		t.Run(name, func(t *testing.T) {
			test.config.ID = "vm"
			var bad []string
			var invalid *smolvm.ValidationError
			if err := test.config.WithDefaults().Validate(); errors.As(err, &invalid) {
				for _, field := range invalid.Fields {
					bad = append(bad, field.Field)
				}
			}
			if !slices.Equal(bad, test.bad) {
				t.Errorf("bad fields: %q, want %q", bad, test.bad)
			}
		})
	}
	// A mode without forwards has no address of the host either.
	if got := (smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkNone}}).WithDefaults(); got.SSHHostAddr.IsValid() {
		t.Errorf("SSH is offered at %s", got.SSHHostAddr)
	}
	if got := (smolvm.VMConfig{}).WithDefaults(); got.Network.Mode != smolvm.NetworkUser {
		t.Errorf("the usual mode is %q", got.Network.Mode)
	}
}
