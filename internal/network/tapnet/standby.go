package tapnet

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm/internal/network"
)

var _ network.Claimer = (*Network)(nil)

// Claim implements [network.Claimer]: the interface gets its name as the VM's, and the host all
// that it needs for it. The VMM has the interface open, and does not see that. The guest's CPUs
// are held.
func (n *Network) Claim(ctx context.Context, config network.Config, vm string) error {
	n.changing.Lock()
	defer n.changing.Unlock()
	fail := func(err error) error {
		return fmt.Errorf("make the network that stood by that of VM %s: %w", vm, withHint(err))
	}
	if !n.config.IsStandby() {
		return fail(errors.New("it does not stand by"))
	}
	owner := n.owner
	owner.VM = vm
	claimed := &Network{config: config, owner: owner}
	if err := claimed.check(); err != nil {
		return fail(err)
	}
	unlock, err := lock(ctx)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	before := n.config.TAP
	former := n.owner
	n.config, n.owner = config, owner
	err = n.make(n.files, func(handle *netlink.Handle) (int, error) {
		return n.rename(handle, before, former)
	})
	if err != nil {
		return fail(errors.Join(err, n.undo(), removeTAP(before, former)))
	}
	return nil
}

// rename gives the interface that stood by its name and its owner.
func (n *Network) rename(handle *netlink.Handle, before string, former Owner) (index int, err error) {
	link, err := ownTAP(handle, before, former)
	if err != nil {
		return 0, err
	}
	if link == nil {
		return 0, fmt.Errorf("interface %s is gone", before)
	}
	if err := removeDeadTAP(handle, n.config.TAP, n.owner); err != nil {
		return 0, err
	}
	// The alias first: what is found by its owner is then found by both names.
	if err := handle.LinkSetAlias(link, n.owner.String()); err != nil {
		return 0, fmt.Errorf("say whose interface %s is: %w", before, err)
	}
	if err := handle.LinkSetName(link, n.config.TAP); err != nil {
		return 0, errors.Join(fmt.Errorf("rename interface %s to %s: %w", before, n.config.TAP, err), deleteLink(handle, link))
	}
	return link.Attrs().Index, nil
}

// removeTAP removes the interface of a name if it is an owner's.
func removeTAP(name string, owner Owner) error {
	handle, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer handle.Close()
	link, err := ownTAP(handle, name, owner)
	if err != nil || link == nil {
		return err
	}
	return deleteLink(handle, link)
}
