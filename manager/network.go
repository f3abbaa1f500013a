package manager

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/addrpool"
	"github.com/smolvm/smolvm/internal/network/tapnet"
	"github.com/smolvm/smolvm/internal/store"
)

// checkNetwork returns why a VM can't be connected as its configuration says, on this host and
// by this process.
func checkNetwork(config smolvm.VMConfig) error {
	asked := config.Network
	var err error
	if asked.Pool.IsValid() {
		err = network.CheckPool(asked.Pool)
	}
	if err == nil && network.UsesTAP(asked.Mode) {
		err = tapnet.CheckHost(asked.Bridge)
	}
	if err == nil && config.Egress != nil && !network.HasPolicies(asked.Mode) {
		err = noPolicies(asked.Mode)
	}
	if err != nil {
		return &smolvm.NetworkError{ID: config.ID, Op: fmt.Sprintf("connect it in mode %s", asked), Err: err}
	}
	return nil
}

// noPolicies returns the error of an egress policy in a mode that has none.
func noPolicies(mode smolvm.NetworkMode) error {
	if network.HasPolicies(mode) {
		return nil
	}
	return &smolvm.Error{
		Hint: fmt.Sprintf("create the VM in network mode %s or %s, or without an egress policy", smolvm.NetworkUser, smolvm.NetworkTAP),
		Err:  fmt.Errorf("%w: there are no egress policies in network mode %s", smolvm.ErrUnsupported, mode),
	}
}

// noForwards returns the error of a forward to a VM whose mode has none; nil if it has.
func noForwards(vm store.VM) error {
	mode := vm.Config.Network.Mode
	if mode.Forwards() {
		return nil
	}
	hint := "`smolvm exec`, `shell`, `cp` and `ssh` need no network; create the VM in another network mode to forward ports"
	if mode == smolvm.NetworkBridge {
		hint = "connect to the guest by the bridge's network; `smolvm exec`, `shell`, `cp` and `ssh` need no network"
	}
	return &smolvm.Error{Hint: hint, Err: fmt.Errorf("%w: no port is forwarded in network mode %s", smolvm.ErrUnsupported, mode)}
}

// poolFor returns the pool that a new VM has its address in; not valid: it needs none.
func (m *Manager) poolFor(ctx context.Context, config smolvm.VMConfig) (netip.Prefix, error) {
	if !network.UsesTAP(config.Network.Mode) {
		return netip.Prefix{}, nil
	}
	book := addrpool.Book{
		Path: m.dir.Networks(), Lock: m.dir.NetworksLock(), Directory: m.networkDirectory(), InUse: m.poolsInUse,
	}
	pool, err := book.Take(ctx, config.Network.Pool)
	if err != nil {
		return pool, &smolvm.NetworkError{ID: config.ID, Op: "choose a pool of addresses", Err: err}
	}
	return pool, nil
}

// poolsInUse returns the pools that VMs have addresses in, each once.
func (m *Manager) poolsInUse(ctx context.Context) ([]netip.Prefix, error) {
	vms, err := m.store.ListVMs(ctx, "")
	var pools []netip.Prefix
	for _, vm := range vms {
		if vm.Pool.IsValid() && !slices.Contains(pools, vm.Pool) {
			pools = append(pools, vm.Pool)
		}
	}
	return pools, err
}

// networkDirectory names the data directory in what its VMs have on the host.
func (m *Manager) networkDirectory() string { return tapnet.DirectoryName(m.dir.Root()) }

// collectNetwork removes what a VM that does not run has on the host, or what all such VMs have
// if the id is empty.
func (m *Manager) collectNetwork(ctx context.Context, id string) error {
	_, err := tapnet.Collect(ctx, m.networkDirectory(), id)
	return err
}

// exhausted makes the error of a pool without a free address that of the domain.
func exhausted(pool netip.Prefix, err error) error {
	if !pool.IsValid() || !errors.Is(err, store.ErrNoneFree) {
		return err
	}
	return &smolvm.Error{
		Hint: "delete VMs that are not needed, or ask for a larger pool",
		Err:  fmt.Errorf("%w: %s has no address left for another VM: %w", network.ErrPoolExhausted, pool, err),
	}
}
