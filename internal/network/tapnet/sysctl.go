package tapnet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// sysctlRoot is where the kernel has the settings of the network namespace of whoever looks.
const sysctlRoot = "/proc/sys/net"

func sysctl(name string) (string, error) {
	text, err := os.ReadFile(filepath.Join(sysctlRoot, name))
	return strings.TrimSpace(string(text)), err
}

// setSysctl sets a value that is not set so already; where /proc/sys can't be written to, as
// in many containers, what is set already will do.
func setSysctl(name, value string) error {
	if now, err := sysctl(name); err == nil && now == value {
		return nil
	}
	return os.WriteFile(filepath.Join(sysctlRoot, name), []byte(value), 0) // it is there
}

// forwardIPv4 has the host forward packets. It stays so: others may rely on it by then.
func forwardIPv4() error {
	if err := setSysctl("ipv4/ip_forward", "1"); err != nil {
		return &smolvm.Error{
			Hint: "run: sysctl -w net.ipv4.ip_forward=1",
			Err:  fmt.Errorf("this host does not forward packets, and can't be told to: %w", err),
		}
	}
	return nil
}

// errNoIPv6 matches the reason for which guests have no IPv6.
var errNoIPv6 = errors.New("guests get no IPv6")

// forwardIPv6 has the host forward packets of IPv6, or returns why guests get none, which
// matches [errNoIPv6]. A host that forwards takes no routes from routers any more, so one
// that lives by those is left as it is.
func forwardIPv6() error {
	const forwarding = "ipv6/conf/all/forwarding"
	disabled, err := sysctl("ipv6/conf/all/disable_ipv6")
	switch {
	case err != nil:
		return fmt.Errorf("%w: this host has none", errNoIPv6)
	case disabled != "0":
		return fmt.Errorf("%w: it is disabled on this host", errNoIPv6)
	}
	if now, err := sysctl(forwarding); err == nil && now != "0" {
		return nil
	}
	learned, err := hasLearnedRoutes()
	if err == nil && learned {
		return &smolvm.Error{
			Hint: "run: sysctl -w net.ipv6.conf.all.accept_ra=2 net.ipv6.conf.default.accept_ra=2 net.ipv6.conf.all.forwarding=1, " +
				"and set accept_ra=2 on the interface to the router",
			Err: fmt.Errorf("%w: this host has its own routes from a router, and would lose them if it forwarded", errNoIPv6),
		}
	}
	if err == nil {
		err = setSysctl(forwarding, "1")
	}
	if err != nil {
		return fmt.Errorf("%w: this host does not forward it: %w", errNoIPv6, err)
	}
	return nil
}

// hasLearnedRoutes reports whether a router has told the host a route.
func hasLearnedRoutes() (bool, error) {
	filter := &netlink.Route{Protocol: unix.RTPROT_RA, Table: unix.RT_TABLE_UNSPEC}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	return len(routes) > 0, err
}

// guardInterface sets what a host should not do on the interface of a guest. It is not all
// that keeps the guest within its bounds, so a host where it can't be set will do.
func guardInterface(name string, proxyARP bool) {
	settings := map[string]string{
		// The host answers for the address that it has on this interface, and tells no other.
		"ipv4/conf/" + name + "/arp_ignore":       "1",
		"ipv4/conf/" + name + "/accept_redirects": "0",
		"ipv4/conf/" + name + "/send_redirects":   "0",
		"ipv4/conf/" + name + "/rp_filter":        "1",
		// It takes neither routes nor addresses from the guest.
		"ipv6/conf/" + name + "/accept_ra":        "0",
		"ipv6/conf/" + name + "/accept_redirects": "0",
	}
	if proxyARP {
		settings["ipv4/conf/"+name+"/proxy_arp"] = "1"
	}
	for setting, value := range settings {
		_ = setSysctl(setting, value)
	}
}

// forbidIPv6 keeps the host from having addresses of IPv6 on an interface.
func forbidIPv6(name string) error {
	err := setSysctl("ipv6/conf/"+name+"/disable_ipv6", "1")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
