package tapnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/intercept"
	"github.com/smolvm/smolvm/internal/network/outbound"
)

var _ network.EgressSetter = (*Network)(nil)

// newOutbound makes the way out for the flows that the shim carries, in place of the one that
// there is.
func (n *Network) newOutbound() {
	out, err := outbound.New(outbound.Config{
		Inside: []netip.Prefix{n.config.Prefix, network.ULA()}, Metadata: n.config.Metadata, Egress: n.config.Egress,
		MayReachVM: n.mayReachVM,
	})
	out.SetRecorder(&n.records)
	if before := n.out.Swap(out); before != nil {
		before.Close() // of the guest that stood by, which had no flows
	}
	n.problem = errors.Join(n.problem, err)
}

// mayReachVM reports whether the guest and the one with an address are both open to others. The
// kernel is asked, as that is another VM's.
func (n *Network) mayReachVM(addr netip.Addr) bool {
	if !n.config.OpenToVMs {
		return false
	}
	conn, err := nftables.New()
	if err != nil {
		return false
	}
	open, err := conn.GetSetElements(set(openSet))
	if err != nil {
		return false
	}
	routes, err := netlink.RouteGetWithOptions(addr.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil || len(routes) != 1 {
		return false
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	return err == nil && slices.ContainsFunc(open, func(e nftables.SetElement) bool {
		return slices.Equal(e.Key, ifname(link.Attrs().Name))
	})
}

// isOpen reports whether a policy leaves the guest all that it has without one.
func isOpen(p network.Policy) bool {
	return len(p.Rules) == 0 && (p.Default == "" || p.Default == network.DefaultAllow)
}

// SetEgress implements [network.EgressSetter]. The connections that the kernel has forwarded as
// long as there was no policy end with the first one.
func (n *Network) SetEgress(egress network.Egress) error {
	if n.config.Mode == network.Bridge {
		return fmt.Errorf("set the egress policy: %w", errNoPolicies())
	}
	n.changing.Lock()
	defer n.changing.Unlock()
	if n.ended {
		return fmt.Errorf("set the egress policy: %w", net.ErrClosed)
	}
	if n.config.IsStandby() {
		return errors.New("set the egress policy: the guest stands by, and has no network yet")
	}
	restrict := !isOpen(egress.Policy)
	if egress.Revision >= n.out.Load().EgressRevision() && restrict && !n.has.restricted {
		if err := n.restrict(); err != nil {
			return fmt.Errorf("set the egress policy: %w", err)
		}
	}
	if err := n.out.Load().SetEgress(egress); err != nil {
		return err
	}
	if !restrict && n.has.restricted {
		if err := n.unrestrict(); err != nil {
			return fmt.Errorf("set the egress policy: %w", err)
		}
	}
	return nil
}

// SetSecrets has secrets put into the guest's flows that begin from now on. Under a policy that
// denies anything this process carries all of them; a network without one has no secrets.
func (n *Network) SetSecrets(secrets *intercept.Interceptor) {
	if out := n.out.Load(); out != nil {
		out.SetSecrets(secrets)
	}
}

// EgressRevision implements [network.EgressSetter].
func (n *Network) EgressRevision() int64 {
	return n.out.Load().EgressRevision()
}

// errNoPolicies returns why a VM on a bridge can't have a policy.
func errNoPolicies() error {
	return &smolvm.Error{
		Hint: "create the VM in network mode user or tap, or without an egress policy",
		Err: fmt.Errorf("%w: there are no egress policies in network mode %q, in which the VM's flows do not pass this host",
			smolvm.ErrUnsupported, network.Bridge),
	}
}

// carry opens what takes the guest's flows, if it is not there yet, and has the host lead them
// there once the table does.
func (n *Network) carry(handle *netlink.Handle) error {
	if n.carrier == nil {
		carrier, err := newCarrier(n.config, n.out.Load())
		if err != nil {
			return err
		}
		n.carrier = carrier
	}
	return divert(handle, n.config)
}

// restrict lets nothing of the guest out but what the shim carries.
func (n *Network) restrict() error {
	unlock, err := lockSoon()
	if err != nil {
		return err
	}
	defer unlock()
	tools, err := openTools()
	if err != nil {
		return err
	}
	defer tools.close()
	if err := n.carry(tools.handle); err != nil {
		return withHint(err)
	}
	known, err := look(tools.conn)
	if err != nil {
		return err
	}
	has := n.has
	has.restricted, has.carrier = true, n.carrier.port
	if err := known.ensureTable(tools.conn); err != nil {
		return err
	}
	known.ensureCarrying(tools.conn)
	if err := n.changeOffers(tools.conn, has); err != nil {
		return err
	}
	tools.forget([]netip.Addr{n.config.Guest, n.config.Guest6}, netlink.ConntrackOrigSrcIP)
	return nil
}

// unrestrict lets out again what shims don't carry. The rest the shim goes on to carry, so that
// no connection ends.
func (n *Network) unrestrict() error {
	unlock, err := lockSoon()
	if err != nil {
		return err
	}
	defer unlock()
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	has := n.has
	has.restricted = false
	return n.changeOffers(conn, has)
}

// changeOffers commits a transaction that makes the VM's elements those of other offers.
func (n *Network) changeOffers(conn *nftables.Conn, has offers) error {
	keys := func(of offers) map[string]element {
		all := map[string]element{}
		for _, e := range elementsOf(n.config, n.owner, of) {
			all[e.set+string(e.Key)+string(e.Val)] = e
		}
		return all
	}
	before, after := keys(n.has), keys(has)
	var added, removed []element
	for key, e := range after {
		if _, is := before[key]; !is {
			added = append(added, e)
		}
	}
	for key, e := range before {
		if _, stays := after[key]; !stays {
			removed = append(removed, e)
		}
	}
	if err := removeElements(conn, removed); err != nil {
		return err
	}
	if err := addElements(conn, added); err != nil {
		return err
	}
	if err := conn.Flush(); err != nil {
		return changeError(err, has)
	}
	n.has = has
	return nil
}

// changeError returns the error of a transaction, with what to do about it.
func changeError(err error, has offers) error {
	err = fmt.Errorf("change the rules of nftables: %w", err)
	if has.carrier != 0 && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)) {
		err = &smolvm.Error{Hint: "load the module nft_tproxy, or use network mode user, or no egress policy", Err: err}
	}
	return withHint(err)
}

// endFlows ends what the shim carries, and returns when nothing of it runs any more.
func (n *Network) endFlows() {
	n.ended = true
	out := n.out.Load()
	if out != nil {
		out.Close()
	}
	if n.carrier != nil {
		n.carrier.close()
		n.carrier.wait()
	}
	if out != nil {
		out.Wait()
	}
}
