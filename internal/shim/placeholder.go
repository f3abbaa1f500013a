package shim

import (
	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Placeholder completes the spec of a VM that nobody has asked for yet: with a network and an
// identity that no other VM has, and that nobody can log in by.
func Placeholder(spec Spec) (Spec, error) {
	at, err := network.Plan(smolvm.NetworkUser, network.PlaceholderIndex)
	if err != nil {
		return spec, err
	}
	hello, err := identity.Placeholder(identity.NetworkOf(at))
	if err != nil {
		return spec, err
	}
	spec.ID, spec.Run = spec.VMM.ID, NewRun()
	spec.VMM.NIC = &vmm.NIC{MAC: at.MAC}
	attached := at.Config()
	spec.Network = &attached
	spec.Hello = &hello
	spec.Ready = smolvm.ReadyAgent
	return spec, nil
}
