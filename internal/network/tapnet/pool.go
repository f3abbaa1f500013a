package tapnet

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// ErrPoolCollides matches the error of a pool that the host has a route into.
var ErrPoolCollides = errors.New("the pool of addresses collides with a route of the host")

// ChoosePool returns the pool that a data directory is to have: the one that is asked for, or
// if that is not valid, the first of some that collides with no route of the host. The error
// matches [ErrPoolCollides] if none is left. Directory is the ID of the data directory, whose
// own VMs' routes don't count. Others are pools that the data directory has beside it, and must
// not overlap.
func ChoosePool(asked netip.Prefix, directory string, others ...netip.Prefix) (netip.Prefix, error) {
	if asked.IsValid() {
		if err := network.CheckPool(asked); err != nil {
			return netip.Prefix{}, err
		}
		return asked, checkPool(asked, directory)
	}
	taken, err := routesOfOthers(directory)
	if err != nil {
		return netip.Prefix{}, err
	}
	for _, other := range others {
		taken = append(taken, route{other, "another pool of the data directory"})
	}
	for _, pool := range candidates() {
		if err = collision(pool, taken); err == nil {
			return pool, nil
		}
	}
	return netip.Prefix{}, err
}

// candidates returns the pools that are tried: networks of 172.16.0.0/12, and then some of
// 10.0.0.0/8 that few use.
func candidates() []netip.Prefix {
	pools := []netip.Prefix{network.DefaultPool()}
	for second := byte(31); second > 16; second-- { // Docker takes them from 17 on
		pools = append(pools, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, second}), 16))
	}
	for second := byte(200); second < 255; second++ {
		pools = append(pools, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, second}), 16))
	}
	return pools
}

// route is a network that the host has a route into.
type route struct {
	to  netip.Prefix
	how string // for a person
}

// checkPool returns an error that matches [ErrPoolCollides] if the host has a route into a
// pool.
func checkPool(pool netip.Prefix, directory string) error {
	taken, err := routesOfOthers(directory)
	if err != nil {
		return err
	}
	return collision(pool, taken)
}

func collision(pool netip.Prefix, taken []route) error {
	for _, r := range taken {
		if r.to.Overlaps(pool) {
			return collides(pool, r)
		}
	}
	return nil
}

func collides(pool netip.Prefix, r route) error {
	return &smolvm.Error{
		Hint: "give the data directory a pool that the host has no route into, or none, and one is chosen",
		Err:  fmt.Errorf("%w: %s overlaps %s, %s", ErrPoolCollides, pool, r.to, r.how),
	}
}

// routesOfOthers returns where the host has routes to, but for default routes and those to
// the VMs of a data directory.
func routesOfOthers(directory string) ([]route, error) {
	names, err := interfacesOfOthers(directory)
	if err != nil {
		return nil, err
	}
	// All tables, as rules may lead to any.
	all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, all, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list the host's routes: %w", err)
	}
	var found []route
	for _, r := range routes {
		if r, ok := describe(r, names); ok {
			found = append(found, r)
		}
	}
	return found, nil
}

// describe returns what a route leads to; ok is false if it does not count.
func describe(r netlink.Route, names map[int]string) (_ route, ok bool) {
	if r.Dst == nil {
		return route{}, false
	}
	addr, _ := netip.AddrFromSlice(r.Dst.IP)
	bits, _ := r.Dst.Mask.Size()
	to := netip.PrefixFrom(addr.Unmap(), bits)
	// Half of all addresses is what VPNs make two routes of in place of a default route.
	if bits <= 1 || to.Addr().IsLoopback() || to.Addr().IsMulticast() {
		return route{}, false
	}
	how := "to which the host has a route"
	if r.LinkIndex != 0 {
		name, others := names[r.LinkIndex]
		if !others {
			return route{}, false
		}
		how += " by interface " + name
	}
	return route{to, how}, true
}

// interfacesOfOthers returns the interfaces but for those of VMs of a data directory.
func interfacesOfOthers(directory string) (map[int]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the host's interfaces: %w", err)
	}
	names := map[int]string{}
	for _, link := range links {
		at := link.Attrs()
		owner, ok := parseOwner(at.Alias)
		if ours := strings.HasPrefix(at.Name, network.TAPPrefix) && ok && owner.Directory == directory; !ours {
			names[at.Index] = at.Name
		}
	}
	return names, nil
}

// checkAddress returns an error that matches [ErrPoolCollides] if the host has a route into a
// pool by which it would reach one of its addresses. It asks for that address alone, and so
// takes no longer when there are many routes.
func checkAddress(handle *netlink.Handle, pool netip.Prefix, addr netip.Addr, tap string) error {
	routes, err := handle.RouteGetWithOptions(addr.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return nil // there is none, not even a default route
	}
	if err != nil {
		return fmt.Errorf("ask for the host's route to %s: %w", addr, err)
	}
	for _, r := range routes {
		names := map[int]string{}
		if r.LinkIndex != 0 {
			link, err := handle.LinkByIndex(r.LinkIndex)
			if err != nil || link.Attrs().Name == tap {
				continue // it is gone meanwhile, or what a dead owner has left
			}
			names[r.LinkIndex] = link.Attrs().Name
		}
		if r, ok := describe(r, names); ok {
			return collides(pool, r)
		}
	}
	return nil
}
