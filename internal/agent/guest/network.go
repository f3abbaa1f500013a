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
	name  string     // of the interface; empty before it is set up
	state wire.Network
}

// ready reports whether there is nothing to be set up.
func (n *guestNetwork) ready(want *wire.Network) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if want == nil {
		return true
	}
	return n.name != "" && n.state.MAC == want.MAC && n.state.Address == want.Address && n.state.Gateway == want.Gateway && n.state.MTU == want.MTU
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
	if err := raise(fd, "lo"); err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	name, err := findInterface(fd, network.MAC)
	if err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	withoutIPv6(name)
	steps := []func() error{
		func() error { return setAddress(fd, name, unix.SIOCSIFADDR, network.Address.Addr()) },
		func() error { return setAddress(fd, name, unix.SIOCSIFNETMASK, netmask(network.Address.Bits())) },
		func() error { return setMTU(fd, name, network.MTU) },
		func() error { return raise(fd, name) },
		func() error { return addDefaultRoute(fd, network.Gateway) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("set up interface %s: %w", name, err)
		}
	}
	n.name, n.state = name, network
	return nil
}

func controlSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("set up network: %w", err)
	}
	return fd, nil
}

// withoutIPv6 keeps the kernel from looking for IPv6 neighbours and routers that are
// not there: the host's side speaks IPv4 only.
func withoutIPv6(name string) {
	_ = os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", name, "disable_ipv6"), []byte("1"), 0)
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
	r := newIfreq(name)
	if err := r.do(fd, unix.SIOCGIFFLAGS); err != nil {
		return err
	}
	*(*uint16)(unsafe.Pointer(&r.data)) |= unix.IFF_UP | unix.IFF_RUNNING
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
