package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
)

// Egress returns a VM's egress policy. The error matches [smolvm.ErrVMNotFound].
func (m *Manager) Egress(ctx context.Context, id string) (smolvm.EgressState, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return smolvm.EgressState{}, err
	}
	return egressState(vm)
}

func egressState(vm store.VM) (smolvm.EgressState, error) {
	state := smolvm.EgressState{Revision: vm.EgressRevision}
	if vm.Config.Egress != nil {
		state.Policy = *vm.Config.Egress
	}
	if vm.EgressWithin != "" {
		state.Within = &smolvm.EgressPolicy{}
		if err := json.Unmarshal([]byte(vm.EgressWithin), state.Within); err != nil {
			return state, fmt.Errorf("read the egress policy of VM %q: %w", vm.ID, err)
		}
	}
	return state, nil
}

// SetEgress gives a VM another egress policy, at once if it runs: connections that it does not
// allow have ended when this returns.
//
// The error is a [*smolvm.ValidationError] that names every bad rule, or a
// [*smolvm.NetworkError]: the policy is as it was then. A fork, or a VM that was restored
// from a snapshot, can't be given a policy that allows more than that of its origin did.
func (m *Manager) SetEgress(ctx context.Context, id string, policy smolvm.EgressPolicy) (smolvm.EgressState, error) {
	began := time.Now()
	parsed, err := network.PolicyOf(policy)
	if err != nil {
		return smolvm.EgressState{}, vmError("set the egress policy of", id, err)
	}
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return smolvm.EgressState{}, err
	}
	defer lock.unlock()
	fail := func(err error) (smolvm.EgressState, error) {
		return smolvm.EgressState{}, &smolvm.NetworkError{ID: id, Op: "set the egress policy", Err: err}
	}
	if err := noPolicies(vm.Config.Network.Mode); err != nil {
		return fail(err)
	}
	state, err := egressState(vm)
	if err != nil {
		return smolvm.EgressState{}, err
	}
	if state.Within != nil {
		if err := checkWithin(policy, *state.Within); err != nil {
			return fail(err)
		}
	}
	if err := checkSecrets(vm.Config, parsed); err != nil {
		return fail(err)
	}
	before := vm
	vm.Config.Egress, vm.EgressRevision = policy.Clone(), vm.EgressRevision+1
	// The row comes first: should this process be killed in between, the next start has the
	// policy, and a running VM gets it when it is set again.
	if err := m.store.SetConfig(ctx, vm); err != nil {
		return fail(err)
	}
	step.Reached(ctx, "policy set/row")
	if vm.State.Alive() {
		err := shim.NewClient(m.runtimeDir(id)).SetEgress(ctx, network.Egress{Revision: vm.EgressRevision, Policy: parsed})
		if err != nil {
			if ctx.Err() == nil { // else it may be in force already
				err = errors.Join(err, m.store.SetConfig(context.WithoutCancel(ctx), before))
			}
			return fail(err)
		}
		step.Reached(ctx, "policy set/in force")
	}
	m.note(ctx, id, "policy-set", began, fmt.Sprintf("revision %d", vm.EgressRevision))
	return egressState(vm)
}

// TestEgress returns what a VM's policy says of a destination, without resolving a name or
// sending anything. The VM need not run.
func (m *Manager) TestEgress(ctx context.Context, id, destination string) (smolvm.EgressVerdict, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return smolvm.EgressVerdict{}, err
	}
	tested, err := network.ParseDestination(destination)
	if err != nil {
		return smolvm.EgressVerdict{}, err
	}
	var policy network.Policy
	if vm.Config.Egress != nil {
		if policy, err = network.PolicyOf(*vm.Config.Egress); err != nil {
			return smolvm.EgressVerdict{}, vmError("read the egress policy of", id, err)
		}
	}
	addr := tested.Flow.To.Addr()
	if at, err := machine.Addresses(vm); err == nil {
		tested.Flow.VMs = at.Prefix.Contains(addr.Unmap())
	}
	if tested.Flow.Host, err = isOwn(addr); err != nil {
		return smolvm.EgressVerdict{}, err
	}
	verdict, reason := policy.Test(tested)
	answer := smolvm.EgressVerdict{
		Destination: destination, Allowed: verdict.Allowed, Number: verdict.Number, Reason: reason, Revision: vm.EgressRevision,
	}
	if verdict.Number > 0 {
		answer.Rule = verdict.Rule.String()
	}
	return answer, nil
}

// isOwn reports whether an interface of the host has an address.
func isOwn(addr netip.Addr) (bool, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("list the host's addresses: %w", err)
	}
	return slices.ContainsFunc(addrs, func(candidate net.Addr) bool {
		prefix, err := netip.ParsePrefix(candidate.String())
		return err == nil && prefix.Addr().Unmap() == addr.Unmap()
	}), nil
}

// inherit gives the configuration of a VM that is made of a saved one its egress policy: that
// of the origin, or a narrower one. It returns the policy that it may not go beyond, as
// [store.VM] keeps it.
func inherit(config *smolvm.VMConfig, narrower *smolvm.EgressPolicy) (within string, err error) {
	var limit smolvm.EgressPolicy
	if config.Egress != nil {
		limit = *config.Egress
	}
	if narrower != nil {
		if err := checkWithin(*narrower, limit); err != nil {
			return "", err
		}
		policy, err := network.PolicyOf(*narrower)
		if err == nil {
			err = checkSecrets(*config, policy)
		}
		if err != nil {
			return "", err
		}
		config.Egress = narrower.Clone()
	}
	text, err := json.Marshal(limit)
	return string(text), err
}

// checkWithin returns an error unless a policy allows nothing that another one does not.
func checkWithin(policy, limit smolvm.EgressPolicy) error {
	inner, err := network.PolicyOf(policy)
	if err != nil {
		return err
	}
	outer, err := network.PolicyOf(limit)
	if err != nil {
		return err
	}
	if inner.Within(outer) {
		return nil
	}
	return &smolvm.Error{
		Hint: "take rules that allow away, or put rules that deny before all others; `smolvm policy show` prints what it must be within",
		Err: fmt.Errorf("%w: the policy may allow more than that of the VM or snapshot that it was made of; a fork's can only be made narrower",
			smolvm.ErrUnsupported),
	}
}
