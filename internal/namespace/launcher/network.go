package launcher

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/namespace"
)

// tunDevice is the device by which TAP interfaces are made; see the kernel's
// Documentation/networking/tuntap.rst.
const tunDevice = "/dev/net/tun"

// The interfaces beside [namespace.TAP].
const (
	bridgeName = "bridge0"
	linkName   = "link0"
)

// noAddress keeps the kernel from giving an interface an address of IPv6: IN6_ADDR_GEN_MODE_NONE
// of linux/if_link.h.
const noAddress = 1

// makeNetwork makes the interfaces of this network namespace, and returns the file of the one
// that is the parent's. If it fails it returns the step that did.
func makeNetwork(mtu, owner int) (file int, failed namespace.Step, err error) {
	quiet()
	if err := makeTAP(owner); err != nil {
		return -1, namespace.StepInterface, err
	}
	file, err = attachTAP(linkName, 0)
	if err != nil {
		return -1, namespace.StepInterface, err
	}
	if failed, err = joinInterfaces(mtu); err != nil {
		return -1, failed, errors.Join(err, unix.Close(file))
	}
	return file, "", nil
}

// quiet makes the kernel say nothing by itself in this namespace, and see nothing in bridged
// frames that is for it. Where /proc is read-only the settings of each interface have to do.
func quiet() {
	for name, value := range map[string]string{
		"ipv6/conf/all/disable_ipv6":          "1",
		"ipv6/conf/default/disable_ipv6":      "1",
		"bridge/bridge-nf-call-iptables":      "0",
		"bridge/bridge-nf-call-ip6tables":     "0",
		"bridge/bridge-nf-call-arptables":     "0",
		"bridge/bridge-nf-filter-vlan-tagged": "0",
	} {
		if file, err := os.OpenFile("/proc/sys/net/"+name, os.O_WRONLY, 0); err == nil {
			_, _ = file.WriteString(value)
			_ = file.Close()
		}
	}
}

// makeTAP makes the command's interface, which lasts as long as the namespace.
func makeTAP(owner int) error {
	file, err := attachTAP(namespace.TAP, unix.IFF_VNET_HDR)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(file) }()
	if err := unix.IoctlSetInt(file, unix.TUNSETOWNER, owner); err != nil {
		return fmt.Errorf("give %s to user %d: %w", namespace.TAP, owner, err)
	}
	if err := unix.IoctlSetInt(file, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("keep %s: %w", namespace.TAP, err)
	}
	return nil
}

// attachTAP makes a TAP interface and returns its file. The interface goes when that is closed.
func attachTAP(name string, flags uint16) (int, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: tunDevice, Err: err}
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("make %s: %w", name, err), unix.Close(fd))
	}
	return fd, nil
}

// joinInterfaces makes the bridge, and brings all up.
func joinInterfaces(mtu int) (failed namespace.Step, err error) {
	snooping := false // a table that the guest could fill
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return namespace.StepBridge, fmt.Errorf("make %s: %w", bridgeName, err)
	}
	bridge, err := netlink.LinkByName(bridgeName)
	if err != nil {
		return namespace.StepBridge, err
	}
	for _, name := range []string{namespace.TAP, linkName} {
		if err := addPort(bridge, name, mtu); err != nil {
			return namespace.StepLink, fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := up(bridge, mtu); err != nil {
		return namespace.StepLink, fmt.Errorf("%s: %w", bridgeName, err)
	}
	return "", nil
}

// addPort makes an interface a port of the bridge that learns no addresses: a table of them is
// of no use between two, and the guest could fill it.
func addPort(bridge netlink.Link, name string, mtu int) error {
	port, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("add it to %s: %w", bridgeName, err)
	}
	if err := netlink.LinkSetLearning(port, false); err != nil {
		return fmt.Errorf("make it learn no addresses: %w", err)
	}
	return up(port, mtu)
}

func up(link netlink.Link, mtu int) error {
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set an MTU of %d bytes: %w", mtu, err)
	}
	// A kernel without IPv6 has no such mode, and needs none.
	if err := netlink.LinkSetIP6AddrGenMode(link, noAddress); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("forbid addresses of IPv6: %w", err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring it up: %w", err)
	}
	return nil
}
