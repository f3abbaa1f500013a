package tapnet

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// refuser tells a guest by ICMP that nothing takes a datagram of its, as a host tells that a port
// is unreachable.
type refuser struct {
	conn net.PacketConn // nil: this process may not open one (CAP_NET_RAW), and the guest waits
	v6   bool
}

func newRefuser(tap string, gateway netip.Addr) *refuser {
	r := &refuser{v6: gateway.Is6()}
	protocol := "ip4:icmp"
	if r.v6 {
		protocol = "ip6:ipv6-icmp"
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		controlErr := raw.Control(func(fd uintptr) { err = r.configure(int(fd), tap) })
		return errors.Join(controlErr, err)
	}}
	if conn, err := config.ListenPacket(context.Background(), protocol, gateway.String()); err == nil {
		r.conn = conn
	}
	return r
}

// configure makes a socket one that sends only.
func (r *refuser) configure(fd int, tap string) error {
	const icmpFilter, all = 1, 0xffffffff
	if r.v6 {
		filter := unix.ICMPv6Filter{Data: [8]uint32{all, all, all, all, all, all, all, all}}
		return errors.Join(
			unix.BindToDevice(fd, tap), unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1),
			unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, icmpFilter, &filter))
	}
	return errors.Join(
		unix.BindToDevice(fd, tap), unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1),
		unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, -1))
}

// refuse tells the guest that a datagram was refused.
func (r *refuser) refuse(flow pair, datagram []byte) {
	if r.conn != nil {
		_, _ = r.conn.WriteTo(unreachable(flow, len(datagram)), &net.IPAddr{IP: flow.from.Addr().AsSlice()})
	}
}

func (r *refuser) close() {
	if r.conn != nil {
		_ = r.conn.Close()
	}
}

// unreachable returns the message of ICMP that a port is unreachable (RFC 792, RFC 4443), which
// has the beginning of the datagram in it. The kernel adds the checksum of ICMPv6.
func unreachable(flow pair, size int) []byte {
	const udpHeader, hopLimit = 8, 64
	length := uint16(udpHeader + size)
	from, to := flow.from.Addr().AsSlice(), flow.to.Addr().AsSlice()
	var message []byte
	if flow.to.Addr().Is4() {
		const header = 20
		message = []byte{3, 3, 0, 0, 0, 0, 0, 0, 0x45, 0}
		message = binary.BigEndian.AppendUint16(message, header+length)
		message = append(message, 0, 0, 0, 0, hopLimit, unix.IPPROTO_UDP, 0, 0)
	} else {
		message = []byte{1, 4, 0, 0, 0, 0, 0, 0, 0x60, 0, 0, 0}
		message = binary.BigEndian.AppendUint16(message, length)
		message = append(message, unix.IPPROTO_UDP, hopLimit)
	}
	message = append(append(message, from...), to...)
	message = binary.BigEndian.AppendUint16(message, flow.from.Port())
	message = binary.BigEndian.AppendUint16(message, flow.to.Port())
	message = binary.BigEndian.AppendUint16(message, length)
	message = append(message, 0, 0)
	if flow.to.Addr().Is4() {
		binary.BigEndian.PutUint16(message[2:], checksum(message))
	}
	return message
}

// checksum returns the checksum of the Internet (RFC 1071) of an even number of bytes.
func checksum(text []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(text); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(text[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
