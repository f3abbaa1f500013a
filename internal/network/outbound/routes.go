package outbound

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// hostRoutes tells which addresses are the host's own. It asks the kernel each time, which
// takes some 60 µs: addresses and routes come and go while a VM runs.
type hostRoutes struct {
	// byInterface judges by the addresses of interfaces alone; see [newHostRoutes].
	byInterface bool
}

// newHostRoutes finds out what the kernel tells of its routes. An error says what can't be
// found out; what is returned can be used all the same, and lets through no more than it
// should as far as it can know.
//
// A kernel that does not call even 127.0.0.1 local is none of Linux itself: gVisor's, say,
// in which containers run. It has neither tables nor rules, so the addresses of its
// interfaces are all that it has. If the kernel does not answer at all, as where netlink
// is forbidden, nothing is known, and everything is taken for the host's.
func newHostRoutes() (hostRoutes, error) {
	localhost := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 1)
	kind, _, err := findRoute(unix.IPPROTO_TCP, netip.AddrPort{}, localhost)
	if err != nil {
		return hostRoutes{}, fmt.Errorf("the guest gets no connections to the outside, as this host's routes can't be read: %w", err)
	}
	if kind != unix.RTN_LOCAL {
		return hostRoutes{byInterface: true}, errors.New("this host does not tell what its routes are: " +
			"its own addresses are told by its interfaces alone")
	}
	return hostRoutes{}, nil
}

// check returns an error that matches [ErrRefused] if what the host sends to an address
// would get to itself, or to more than one host. ByTAP reports that it would get to another VM, by
// its TAP interface. The protocol is TCP's or UDP's; from is
// where it is sent from, and is not valid before that is known. The kernel is asked with
// all of these, as its rules may choose the route by any of them.
func (r hostRoutes) check(protocol smolvm.Protocol, from, to netip.AddrPort) (byTAP bool, err error) {
	refuse := func(why error) (bool, error) { return false, fmt.Errorf("%s: %w: %w", to.Addr(), ErrRefused, why) }
	// Some are in no table that is asked for this destination: those of interfaces in a
	// VRF, for one.
	switch own, err := isOwn(to.Addr()); {
	case err != nil:
		return refuse(err)
	case own:
		return refuse(fmt.Errorf("%w: an interface of the host has it", errHost))
	}
	if r.byInterface {
		return false, nil
	}
	number := unix.IPPROTO_TCP
	if protocol == smolvm.UDP {
		number = unix.IPPROTO_UDP
	}
	kind, by, err := findRoute(number, from, to)
	switch {
	case err != nil:
		// There is no way to it, or one that is closed: the guest learns no more.
		return refuse(err)
	case kind == unix.RTN_LOCAL:
		return refuse(fmt.Errorf("%w: the host's route to it is a local one", errHost))
	case kind != unix.RTN_UNICAST:
		return refuse(fmt.Errorf("the host's route to it is of type %d, see rtnetlink(7)", kind))
	}
	name, err := interfaceName(by)
	if err != nil {
		return refuse(err)
	}
	return strings.HasPrefix(name, network.TAPPrefix), nil
}

// interfaceName returns the name of an interface by netdevice(7), which asks for that one alone.
func interfaceName(index uint32) (string, error) {
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("find the name of interface %d: %w", index, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = unix.Close(fd) }()
	request, err := unix.NewIfreq("")
	if err != nil {
		return fail(err)
	}
	request.SetUint32(index)
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFNAME, request); err != nil {
		return fail(err)
	}
	return request.Name(), nil
}

// isOwn reports whether an interface of the host has an address, or has it for the first of
// its network, which is for broadcasts or means every router (RFC 4291, section 2.6.1), or, by
// IPv4, for the last, which is for broadcasts too.
func isOwn(addr netip.Addr) (bool, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("list the host's addresses: %w", err)
	}
	for _, candidate := range addrs {
		of, ok := candidate.(*net.IPNet)
		if !ok {
			continue
		}
		own, ok := netip.AddrFromSlice(of.IP)
		own = own.Unmap()
		bits, _ := of.Mask.Size()
		prefix := netip.PrefixFrom(own, bits)
		hasOthers := bits < own.BitLen()-1 // else there are but hosts in it (RFC 3021, RFC 6164)
		switch {
		case !ok || !prefix.IsValid():
		case own == addr, hasOthers && addr == prefix.Masked().Addr(), hasOthers && own.Is4() && addr == network.Last(prefix):
			return true, nil
		}
	}
	return false, nil
}

// findRoute returns the type of the route that the kernel would take (RTN_UNICAST, RTN_LOCAL,
// ...), and the index of the interface by which it leads out, by RTM_GETROUTE of rtnetlink(7). The request is put together here, as the library
// itself can't ask with a protocol and ports.
func findRoute(protocol int, from, to netip.AddrPort) (kind uint8, by uint32, err error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
	message := &nl.RtMsg{}
	message.Family, message.Dst_len = unix.AF_INET, uint8(to.Addr().BitLen())
	if to.Addr().Is6() {
		message.Family = unix.AF_INET6
	}
	request.AddData(message)
	add := func(attribute int, value []byte) { request.AddData(nl.NewRtAttr(attribute, value)) }
	addPort := func(attribute int, port uint16) {
		if port != 0 {
			add(attribute, binary.BigEndian.AppendUint16(nil, port))
		}
	}
	add(unix.RTA_DST, to.Addr().AsSlice())
	if from.Addr().IsValid() {
		message.Src_len = uint8(from.Addr().BitLen())
		add(unix.RTA_SRC, from.Addr().AsSlice())
	}
	add(unix.RTA_IP_PROTO, []byte{byte(protocol)})
	addPort(unix.RTA_SPORT, from.Port())
	addPort(unix.RTA_DPORT, to.Port())
	answers, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	if err != nil {
		return 0, 0, fmt.Errorf("ask for the route: %w", err)
	}
	notUnderstood := errors.New("ask for the route: the kernel's answer is not understood")
	if len(answers) != 1 || len(answers[0]) < unix.SizeofRtMsg {
		return 0, 0, notUnderstood
	}
	attributes, err := nl.ParseRouteAttr(answers[0][unix.SizeofRtMsg:])
	if err != nil {
		return 0, 0, notUnderstood
	}
	for _, attribute := range attributes {
		if attribute.Attr.Type == unix.RTA_OIF && len(attribute.Value) == 4 {
			by = binary.NativeEndian.Uint32(attribute.Value)
		}
	}
	return nl.DeserializeRtMsg(answers[0]).Type, by, nil
}
