package shim

import (
	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Placeholder completes the spec of a VM that nobody has asked for yet: with a network and an
// identity that no other VM has, and that nobody can log in by. Mode is the network's; on a TAP
// interface there is that alone, and no way for the guest to anywhere. MTU is that of the mode user,
// in bytes; zero: 1500.
func Placeholder(spec Spec, mode smolvm.NetworkMode, mtu int) (Spec, error) {
	spec.ID, spec.Run = spec.VMM.ID, NewRun()
	var told *wire.Network
	switch mode {
	case smolvm.NetworkNone:
		told = &wire.Network{}
	case smolvm.NetworkTAP, smolvm.NetworkBridge:
		attached := network.Standby(spec.Run)
		spec.Network, spec.VMM.NIC = &attached, &vmm.NIC{MAC: attached.GuestMAC, TAP: attached.TAP}
		told = &wire.Network{MAC: attached.GuestMAC}
	default:
		at, err := network.Plan(mode, network.PlaceholderIndex)
		if err != nil {
			return spec, err
		}
		attached := at.Config()
		attached.MTU = mtu
		spec.Network, spec.VMM.NIC = &attached, &vmm.NIC{MAC: at.MAC}
		told = identity.NetworkOf(at)
	}
	hello, err := identity.Placeholder(told)
	if err != nil {
		return spec, err
	}
	spec.Hello = &hello
	spec.Ready = smolvm.ReadyAgent
	return spec, nil
}
