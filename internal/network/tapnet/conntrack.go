package tapnet

import (
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forget has the kernel forget the connections that have an address of a guest at one of some
// sides, so that no packet of one passes any more: to the next guest with the same address, or
// beside a policy. What can't be forgotten ends by itself. To look for them takes the kernel tens
// of milliseconds, however few there are, so it is done once for both versions of IP, and not at
// all if there are none.
func (t tools) forget(addrs []netip.Addr, sides ...netlink.ConntrackFilterType) {
	if count, err := sysctl("netfilter/nf_conntrack_count"); err == nil && count == "0" || len(addrs) == 0 {
		return
	}
	flows, _ := t.handle.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC)
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		filters := guestFlows(addrs, family, sides)
		if slices.ContainsFunc(flows, func(flow *netlink.ConntrackFlow) bool {
			return slices.ContainsFunc(filters, func(f netlink.CustomConntrackFilter) bool { return f.MatchConntrackFlow(flow) })
		}) {
			_, _ = t.handle.ConntrackDeleteFilters(netlink.ConntrackTable, family, filters...)
		}
	}
}

// guestFlows returns what matches the connections of guests.
func guestFlows(addrs []netip.Addr, family netlink.InetFamily, sides []netlink.ConntrackFilterType) []netlink.CustomConntrackFilter {
	var filters []netlink.CustomConntrackFilter
	for _, addr := range addrs {
		if addr.Is4() != (family == unix.AF_INET) {
			continue
		}
		for _, side := range sides {
			filter := &netlink.ConntrackFilter{}
			if filter.AddIP(side, addr.AsSlice()) == nil {
				filters = append(filters, filter)
			}
		}
	}
	return filters
}
