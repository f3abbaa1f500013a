package guest

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// guestNetwork is the guest's network, as the hellos make it. Everything is done by
// ioctl (netdevice(7)): netlink would need a library that is a tenth of the agent.
type guestNetwork struct {
	mu    sync.Mutex // guards the following
	made  bool       // it is set up
	name  string     // of the interface; empty: there is none, or it is not set up yet
	state wire.Network
	asks  *dhcpClient // nil: the addresses are fixed
}

// ready reports whether there is nothing to be set up.
func (n *guestNetwork) ready(want *wire.Network) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if want == nil {
		return true
	}
	is := n.state
	return n.made && is.MAC == want.MAC && is.Address == want.Address && is.Gateway == want.Gateway && is.MTU == want.MTU &&
		is.Address6 == want.Address6 && is.Gateway6 == want.Gateway6 && is.DHCP == want.DHCP
}

// adopt gives an interface that is set up already another hardware address: all that
// a guest that was restored lacks, as a rule.
func (n *guestNetwork) adopt(want *wire.Network) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if want == nil || n.name == "" || n.state.MAC == want.MAC {
		return nil
	}
	address, err := net.ParseMAC(want.MAC)
	if err != nil {
		return fmt.Errorf("set up interface %s: %w", n.name, err)
	}
	fd, err := controlSocket()
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	r := newIfreq(n.name)
	*(*uint16)(unsafe.Pointer(&r.data)) = unix.ARPHRD_ETHER
	copy(r.data[2:], address)
	if err := r.do(fd, unix.SIOCSIFHWADDR); err != nil {
		return fmt.Errorf("set hardware address of interface %s: %w", n.name, err)
	}
	n.state.MAC = want.MAC
	if n.state.DHCP { // what the network has given is for the address of before
		n.made = false
	}
	return nil
}

// mac returns the interface's hardware address; empty before it is set up.
func (n *guestNetwork) mac() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.name == "" {
		return ""
	}
	fd, err := controlSocket()
	if err != nil {
		return ""
	}
	defer func() { _ = unix.Close(fd) }()
	return hardwareAddress(fd, n.name).String()
}

// setUp configures the loopback interface and the one of the given MAC.
func (n *guestNetwork) setUp(network wire.Network) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	fd, err := controlSocket()
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	n.asks.stop()
	n.asks = nil
	if err := raise(fd, "lo"); err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	if network.MAC == "" {
		n.made, n.state = true, network
		return nil
	}
	name, err := findInterface(fd, network.MAC)
	if err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	if err := n.configure(fd, name, network); err != nil {
		return fmt.Errorf("set up interface %s: %w", name, err)
	}
	n.made, n.name, n.state = true, name, network
	return nil
}

// await returns when the interface has its addresses, or is not to be waited for any more.
func (n *guestNetwork) await() {
	n.mu.Lock()
	asks := n.asks
	n.mu.Unlock()
	asks.await()
}

// configure configures an interface, which may have been set up in another way.
func (n *guestNetwork) configure(fd int, name string, network wire.Network) error {
	var steps []func() error
	if n.name != "" {
		// With the interface go the routes and the addresses of IPv6.
		steps = append(steps, func() error { return lower(fd, name) })
	}
	steps = append(steps, func() error { return setMTU(fd, name, network.MTU) })
	hasIPv6(name, network.Address6.IsValid() || network.DHCP, network.DHCP)
	switch {
	case network.DHCP:
		steps = append(steps,
			func() error { return setAddress(fd, name, unix.SIOCSIFADDR, netip.IPv4Unspecified()) },
			func() error { return raise(fd, name) },
			func() (err error) {
				n.asks, err = askDHCP(fd, name, network.MAC)
				return err
			})
	case network.Address.IsValid():
		steps = append(steps,
			func() error { return setPrefix(fd, name, network.Address) },
			func() error { return raise(fd, name) },
			func() error { return addDefaultRoute(fd, network.Gateway) })
	}
	if network.Address6.IsValid() {
		steps = append(steps, func() error { return setIPv6(name, network.Address6, network.Gateway6) })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func setPrefix(fd int, name string, prefix netip.Prefix) error {
	if err := setAddress(fd, name, unix.SIOCSIFADDR, prefix.Addr()); err != nil {
		return err
	}
	return setAddress(fd, name, unix.SIOCSIFNETMASK, netmask(prefix.Bits()))
}

func controlSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("set up network: %w", err)
	}
	return fd, nil
}

// hasIPv6 sets whether the kernel speaks IPv6 on an interface. Where the host's side does not,
// it would look for neighbors and routers that are not there. Routed is whether it takes
// addresses and routes from routers.
func hasIPv6(name string, enabled, routed bool) {
	settings := map[string]bool{"disable_ipv6": !enabled}
	if enabled {
		// Nobody else has a fixed address, and to find that out takes a second.
		settings["accept_ra"], settings["autoconf"], settings["accept_dad"] = routed, routed, routed
	}
	for setting, on := range settings {
		value := "0"
		if on {
			value = "1"
		}
		_ = os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", name, setting), []byte(value), 0)
	}
}

// findInterface finds the interface of the given MAC.
func findInterface(fd int, mac string) (string, error) {
	want, err := net.ParseMAC(mac)
	if err != nil {
		return "", err
	}
	const first = "eth0" // it is this one unless the image renames it
	if bytes.Equal(hardwareAddress(fd, first), want) {
		return first, nil
	}
	paths, err := filepath.Glob("/sys/class/net/*/address")
	if err != nil {
		return "", err
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err == nil && strings.EqualFold(trimLine(text), mac) {
			return filepath.Base(filepath.Dir(path)), nil
		}
	}
	return "", fmt.Errorf("no interface has the address %s", mac)
}

// hardwareAddress returns the MAC of an interface, nil if there is no such interface.
func hardwareAddress(fd int, name string) net.HardwareAddr {
	r := newIfreq(name)
	if r.do(fd, unix.SIOCGIFHWADDR) != nil {
		return nil
	}
	return r.data[2:8]
}

func netmask(bits int) netip.Addr {
	mask := ^uint32(0) << (32 - bits)
	return netip.AddrFrom4([4]byte{byte(mask >> 24), byte(mask >> 16), byte(mask >> 8), byte(mask)})
}

// ifreq is struct ifreq of netdevice(7).
type ifreq struct {
	name [unix.IFNAMSIZ]byte
	data [24]byte
}

func newIfreq(name string) *ifreq {
	var r ifreq
	copy(r.name[:unix.IFNAMSIZ-1], name)
	return &r
}

func (r *ifreq) do(fd int, request uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(r))); errno != 0 {
		return errno
	}
	return nil
}

// sockaddr returns struct sockaddr_in with no port.
func sockaddr(addr netip.Addr) (raw [16]byte) {
	*(*uint16)(unsafe.Pointer(&raw)) = unix.AF_INET
	four := addr.As4()
	copy(raw[4:], four[:])
	return raw
}

func setAddress(fd int, name string, request uintptr, addr netip.Addr) error {
	r := newIfreq(name)
	raw := sockaddr(addr)
	copy(r.data[:], raw[:])
	return r.do(fd, request)
}

func setMTU(fd int, name string, mtu int) error {
	if mtu == 0 {
		return nil
	}
	r := newIfreq(name)
	*(*int32)(unsafe.Pointer(&r.data)) = int32(mtu)
	return r.do(fd, unix.SIOCSIFMTU)
}

func raise(fd int, name string) error {
	return changeFlags(fd, name, func(flags uint16) uint16 { return flags | unix.IFF_UP | unix.IFF_RUNNING })
}

func lower(fd int, name string) error {
	return changeFlags(fd, name, func(flags uint16) uint16 { return flags &^ unix.IFF_UP })
}

func changeFlags(fd int, name string, change func(uint16) uint16) error {
	r := newIfreq(name)
	if err := r.do(fd, unix.SIOCGIFFLAGS); err != nil {
		return err
	}
	flags := (*uint16)(unsafe.Pointer(&r.data))
	*flags = change(*flags)
	return r.do(fd, unix.SIOCSIFFLAGS)
}

// rtentry is struct rtentry of the kernel's include/uapi/linux/route.h.
type rtentry struct {
	_                  uint64
	dst, gateway, mask [16]byte
	flags              uint16
	_                  int16
	_                  uint64
	_                  uintptr
	metric             int16
	dev                uintptr
	mtu, window        uint64
	irtt               uint16
}

func addDefaultRoute(fd int, gateway netip.Addr) error {
	if !gateway.IsValid() {
		return nil
	}
	route := rtentry{
		dst:     sockaddr(netip.IPv4Unspecified()),
		gateway: sockaddr(gateway),
		mask:    sockaddr(netip.IPv4Unspecified()),
		flags:   unix.RTF_UP | unix.RTF_GATEWAY,
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&route)))
	if errno != 0 && errno != unix.EEXIST {
		return fmt.Errorf("route by %s: %w", gateway, errno)
	}
	return nil
}
