package tapnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/network"
)

const (
	// divertTable is the table of routes by which all addresses are the host's own.
	divertTable = 0x736d6f6c
	// divertPriority puts the rule that leads there before those of others.
	divertPriority = 100
)

// divert has the host take packets with [carriedMark] for itself, wherever they are to. The rules
// are about what comes from the pool of guests' addresses alone: the kernel also looks, with
// the mark (src_valid_mark), for the way back to a guest, and must find the guest's interface.
func divert(handle *netlink.Handle, c network.Config) error {
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("look at interface lo: %w", err)
	}
	for _, from := range []netip.Prefix{c.Prefix, c.Prefix6} {
		if !from.IsValid() {
			continue
		}
		everything := netip.PrefixFrom(unspecified(from.Addr()), 0)
		route := &netlink.Route{
			LinkIndex: lo.Attrs().Index, Dst: ipNet(everything), Table: divertTable, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		}
		if err := handle.RouteReplace(route); err != nil {
			return fmt.Errorf("add a route by which guests' flows get to their shims: %w", err)
		}
		if err := handle.RuleAdd(divertRule(from)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add a rule by which flows from %s get to shims: %w", from, err)
		}
	}
	return nil
}

func divertRule(from netip.Prefix) *netlink.Rule {
	all := ^uint32(0)
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Table = familyOf(from.Addr()), divertPriority, divertTable
	rule.Src, rule.Mark, rule.Mask = ipNet(from), carriedMark, &all
	return rule
}

// undivert removes what divert has added, for all pools.
func undivert(handle *netlink.Handle) error {
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := handle.RuleListFiltered(family, &netlink.Rule{Table: divertTable}, netlink.RT_FILTER_TABLE)
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			errs = append(errs, fmt.Errorf("list the host's rules of routing: %w", err))
		}
		for _, rule := range rules {
			rule.Family = family
			if err := handle.RuleDel(&rule); err != nil && !isGone(err) {
				errs = append(errs, fmt.Errorf("remove a rule of routing: %w", err))
			}
		}
		routes, err := handle.RouteListFiltered(family, &netlink.Route{Table: divertTable}, netlink.RT_FILTER_TABLE)
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			errs = append(errs, fmt.Errorf("list the host's routes: %w", err))
		}
		for _, route := range routes {
			if err := handle.RouteDel(&route); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("remove a route: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

func familyOf(addr netip.Addr) int {
	if addr.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func unspecified(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
