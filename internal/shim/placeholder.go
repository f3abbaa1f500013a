package shim

import (
	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/vmm"
)

// placeholderLease is an index that no VM gets; see package network.
const placeholderLease = network.FirstIndex - 1

// Placeholder completes the spec of a VM that nobody has asked for yet: with a network and an
// identity that no other VM has, and that nobody can log in by.
func Placeholder(spec Spec) (Spec, error) {
	plan := network.User(placeholderLease)
	hello, err := identity.Placeholder(identity.NetworkOf(plan))
	if err != nil {
		return spec, err
	}
	spec.ID, spec.Run = spec.VMM.ID, NewRun()
	spec.VMM.NIC = &vmm.NIC{MAC: plan.GuestMAC}
	attached := network.ConfigOf(plan)
	spec.Network = &attached
	spec.Hello = &hello
	spec.Ready = smolvm.ReadyAgent
	return spec, nil
}
