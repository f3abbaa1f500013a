package tapnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// claims is how often a name is tried that something else has: each time what has it is
// removed, so more than one is a race with somebody who keeps no lock.
const claims = 5

// claimTAP makes the TAP interface of an owner. One of that name which a dead owner, or an
// earlier process of the same VM, has left is removed.
func claimTAP(handle *netlink.Handle, name string, owner Owner) (index int, err error) {
	for range claims {
		index, err = makeTAP(handle, name, owner)
		// EBUSY: there is an interface of that name; EINVAL: one that is no TAP.
		if err == nil || !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EEXIST) {
			return index, err
		}
		if removeErr := removeDeadTAP(handle, name, owner); removeErr != nil {
			return 0, removeErr
		}
	}
	return 0, err
}

// removeDeadTAP removes the interface of a name if nobody lives who needs it.
func removeDeadTAP(handle *netlink.Handle, name string, claimer Owner) error {
	link, err := handle.LinkByName(name)
	if isNoLink(err) {
		return nil // it is gone meanwhile
	}
	if err != nil {
		return fmt.Errorf("look at interface %s: %w", name, err)
	}
	owner, ok := parseOwner(link.Attrs().Alias)
	switch {
	case !ok:
		return &smolvm.Error{
			Hint: "rename or remove it, or give this data directory another pool of addresses",
			Err:  fmt.Errorf("there is an interface %s already, which is not smolvm's", name),
		}
	case owner.Alive() && (owner.VM != claimer.VM || owner.Directory != claimer.Directory || owner.PID != claimer.PID):
		return &smolvm.Error{
			Hint: "give this data directory another pool of addresses",
			Err:  fmt.Errorf("interface %s is in use by %s", name, owner.Describe()),
		}
	}
	return deleteLink(handle, link)
}

// makeTAP makes a TAP interface that stays when its file is closed. It has its owner before
// it stays, so none that stays is without.
func makeTAP(handle *netlink.Handle, name string, owner Owner) (index int, err error) {
	fail := func(err error) (int, error) {
		err = fmt.Errorf("make TAP interface %s: %w", name, err)
		if errors.Is(err, os.ErrPermission) {
			err = &smolvm.Error{Hint: "run as root or with CAP_NET_ADMIN, or use network mode user", Err: err}
		}
		return 0, err
	}
	file, err := os.OpenFile("/dev/net/tun", os.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = file.Close() }()
	fd := int(file.Fd())
	request, err := unix.NewIfreq(name)
	if err != nil {
		return fail(err)
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return fail(err)
	}
	// Without an owner, any user could open it.
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, os.Getuid()); err != nil {
		return fail(err)
	}
	link, err := handle.LinkByName(name)
	if err != nil {
		return fail(err)
	}
	if err := handle.LinkSetAlias(link, owner.String()); err != nil {
		return fail(err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fail(err)
	}
	return link.Attrs().Index, nil
}

// isNoLink reports whether an error says that an interface is not there.
func isNoLink(err error) bool {
	return errors.As(err, new(netlink.LinkNotFoundError)) || errors.Is(err, unix.ENODEV)
}

// deleteLink removes an interface by its index, which no other interface gets.
func deleteLink(handle *netlink.Handle, link netlink.Link) error {
	if err := handle.LinkDel(link); err != nil && !isNoLink(err) {
		return fmt.Errorf("remove interface %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// ownTAP returns the interface of a name if it is the owner's, or nil.
func ownTAP(handle *netlink.Handle, name string, owner Owner) (netlink.Link, error) {
	link, err := handle.LinkByName(name)
	if isNoLink(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at interface %s: %w", name, err)
	}
	if has, ok := parseOwner(link.Attrs().Alias); !ok || has != owner {
		return nil, nil
	}
	return link, nil
}

// routeTo gives the host its addresses on the interface of a guest, and the routes to the
// guest: to its addresses alone.
func routeTo(handle *netlink.Handle, link netlink.Link, c network.Config) error {
	name := link.Attrs().Name
	guardInterface(name, c.OpenToVMs)
	if c.MTU != 0 {
		if err := handle.LinkSetMTU(link, c.MTU); err != nil {
			return fmt.Errorf("set the MTU of interface %s to %d: %w", name, c.MTU, err)
		}
	}
	// Not with the guest's address as the peer's: the host would not answer for its own then,
	// as arp_ignore compares it with the peer's network.
	addrs := []*netlink.Addr{{IPNet: single(c.Gateway)}}
	if c.Guest6.IsValid() {
		// The kernel would check first that nobody has the address, which takes a second.
		const flags = unix.IFA_F_NODAD
		const generateNone = 1 // IN6_ADDR_GEN_MODE_NONE
		if err := handle.LinkSetIP6AddrGenMode(link, generateNone); err != nil {
			return fmt.Errorf("give interface %s addresses of IPv6: %w", name, err)
		}
		local := &net.IPNet{IP: net.IP{0xfe, 0x80, 15: 1}, Mask: net.CIDRMask(64, 128)}
		addrs = append(addrs,
			&netlink.Addr{IPNet: local, Flags: flags}, &netlink.Addr{IPNet: single(c.Gateway6), Flags: flags})
	} else if err := forbidIPv6(name); err != nil {
		return fmt.Errorf("keep IPv6 from interface %s: %w", name, err)
	}
	for _, addr := range addrs {
		if err := handle.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("give interface %s the address %s: %w", name, addr.IPNet, err)
		}
	}
	if err := handle.LinkSetUp(link); err != nil {
		return fmt.Errorf("set interface %s up: %w", name, err)
	}
	for _, addr := range [][2]netip.Addr{{c.Guest, c.Gateway}, {c.Guest6, c.Gateway6}} {
		guest, gateway := addr[0], addr[1]
		if !guest.IsValid() {
			continue
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: single(guest), Scope: netlink.SCOPE_LINK, Src: gateway.AsSlice()}
		if err := handle.RouteReplace(route); err != nil {
			return fmt.Errorf("add a route to %s by interface %s: %w", guest, name, err)
		}
	}
	return nil
}

// join makes the interface of a guest a port of a bridge.
func join(handle *netlink.Handle, link netlink.Link, c network.Config) error {
	bridge, err := findBridge(handle, c.Bridge)
	if err != nil {
		return err
	}
	name := link.Attrs().Name
	if err := forbidIPv6(name); err != nil {
		return fmt.Errorf("keep IPv6 from interface %s: %w", name, err)
	}
	if err := handle.LinkSetMTU(link, bridge.Attrs().MTU); err != nil {
		return fmt.Errorf("set the MTU of interface %s to that of bridge %s: %w", name, c.Bridge, err)
	}
	if err := handle.LinkSetMaster(link, bridge); err != nil {
		return fmt.Errorf("join interface %s to bridge %s: %w", name, c.Bridge, err)
	}
	if !c.OpenToVMs { // ports that are isolated reach only those that are not
		if err := handle.LinkSetIsolated(link, true); err != nil {
			return fmt.Errorf("isolate interface %s on bridge %s: %w", name, c.Bridge, err)
		}
	}
	if err := handle.LinkSetUp(link); err != nil {
		return fmt.Errorf("set interface %s up: %w", name, err)
	}
	return nil
}

// findBridge finds the bridge of a name.
func findBridge(handle *netlink.Handle, name string) (netlink.Link, error) {
	link, err := handle.LinkByName(name)
	if isNoLink(err) {
		return nil, &smolvm.Error{Hint: "make the bridge, or name one that is there", Err: fmt.Errorf("there is no interface %q", name)}
	}
	if err != nil {
		return nil, fmt.Errorf("look at bridge %s: %w", name, err)
	}
	if link.Type() != "bridge" {
		return nil, &smolvm.Error{Hint: "name a bridge", Err: fmt.Errorf("interface %s is no bridge, but of type %s", name, link.Type())}
	}
	return link, nil
}

// single returns the network that has one address.
func single(addr netip.Addr) *net.IPNet {
	return &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
}

// Usage implements [network.Meter]: what the interface has carried, as the kernel counts it, whose
// side is the other one.
func (n *Network) Usage() (smolvm.NetworkUsage, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return smolvm.NetworkUsage{}, fmt.Errorf("open netlink: %w", err)
	}
	defer handle.Close()
	n.changing.Lock() // its name changes when it is claimed
	defer n.changing.Unlock()
	link, err := handle.LinkByName(n.config.TAP)
	if err != nil {
		return smolvm.NetworkUsage{}, fmt.Errorf("look at interface %s: %w", n.config.TAP, err)
	}
	counted := link.Attrs().Statistics
	if counted == nil {
		return smolvm.NetworkUsage{}, fmt.Errorf("interface %s: the kernel counts nothing", n.config.TAP)
	}
	return smolvm.NetworkUsage{Received: int64(counted.TxBytes), Sent: int64(counted.RxBytes)}, nil
}
