package guest

import (
	"fmt"
	"net"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// in6Ifreq is struct in6_ifreq of the kernel's include/uapi/linux/ipv6.h.
type in6Ifreq struct {
	addr   [16]byte
	prefix uint32
	index  int32
}

// in6Rtmsg is struct in6_rtmsg of the kernel's include/uapi/linux/ipv6_route.h.
type in6Rtmsg struct {
	dst, src, gateway [16]byte
	kind              uint32
	dstLen, srcLen    uint16
	metric            uint32
	info              uint64
	flags             uint32
	index             int32
}

// setIPv6 gives an interface that is up an address of IPv6, and the default route.
func setIPv6(name string, address netip.Prefix, gateway netip.Addr) error {
	found, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set up IPv6: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	request := in6Ifreq{addr: address.Addr().As16(), prefix: uint32(address.Bits()), index: int32(found.Index)}
	if errno := ioctl(fd, unix.SIOCSIFADDR, unsafe.Pointer(&request)); errno != 0 && errno != unix.EEXIST {
		return fmt.Errorf("set address %s: %w", address, errno)
	}
	if !gateway.IsValid() {
		return nil
	}
	route := in6Rtmsg{gateway: gateway.As16(), metric: 1, flags: unix.RTF_UP | unix.RTF_GATEWAY, index: int32(found.Index)}
	if errno := ioctl(fd, unix.SIOCADDRT, unsafe.Pointer(&route)); errno != 0 && errno != unix.EEXIST {
		return fmt.Errorf("route by %s: %w", gateway, errno)
	}
	return nil
}

func ioctl(fd int, request uintptr, argument unsafe.Pointer) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(argument))
	return errno
}
