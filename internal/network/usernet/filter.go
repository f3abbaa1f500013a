package usernet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
)

// filter says which frames of a guest get into the stack: those that a guest with
// one interface and one address sends. A guest is not trusted, and under ever new
// addresses it would make the stack remember all of them. Where the guest may connect
// to is not decided here but by [outbound].
type filter struct {
	guestMAC, gatewayMAC net.HardwareAddr
	guest, gateway       netip.Addr
	guest6, gateway6     netip.Addr // not valid: there is no IPv6
}

func newFilter(config Config) (filter, error) {
	for _, addr := range []netip.Addr{config.Guest, config.Gateway} {
		if !addr.Is4() || !config.Prefix.Contains(addr) {
			return filter{}, fmt.Errorf("address %s is not in the IPv4 network %s", addr, config.Prefix)
		}
	}
	for _, addr := range []netip.Addr{config.Guest6, config.Gateway6} {
		if config.Prefix6.IsValid() && (!addr.Is6() || !config.Prefix6.Contains(addr)) {
			return filter{}, fmt.Errorf("address %s is not in the IPv6 network %s", addr, config.Prefix6)
		}
	}
	guestMAC, err := net.ParseMAC(config.GuestMAC)
	if err != nil || len(guestMAC) != macLength {
		return filter{}, fmt.Errorf("MAC address %q of the guest is not valid", config.GuestMAC)
	}
	ours, err := net.ParseMAC(gatewayMAC)
	return filter{guestMAC: guestMAC, gatewayMAC: ours, guest: config.Guest, gateway: config.Gateway, guest6: config.Guest6, gateway6: config.Gateway6}, err
}

func (n *Network) admit(frame []byte) bool { return n.filter.Load().admit(frame) }

// Offsets and values in frames of Ethernet II (RFC 894), ARP (RFC 826), IPv4 (RFC 791), UDP (RFC 768)
// and DHCP (RFC 2131).
const (
	macLength      = 6
	ethernetHeader = 14
	etherTypeIPv4  = 0x0800
	etherTypeARP   = 0x0806
	etherTypeIPv6  = 0x86dd

	arpLength = 28
	arpTarget = 24

	ipv4MinHeader = 20
	ipv4More      = 0x2000 // flag: more fragments follow
	ipv4Offset    = 0x1fff // where in the datagram the fragment belongs
	protocolICMP  = 1
	protocolTCP   = 6
	protocolUDP   = 17

	dnsPort        = 53
	dhcpServerPort = 67
	udpHeader      = 8
	dhcpHWAddr     = 28
)

func (f filter) admit(frame []byte) bool {
	if len(frame) < ethernetHeader {
		return false
	}
	to, from := frame[:macLength], frame[macLength:2*macLength]
	kind := binary.BigEndian.Uint16(frame[2*macLength:])
	many := bytes.Equal(to, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}) || kind == etherTypeIPv6 && to[0] == 0x33 && to[1] == 0x33
	if !bytes.Equal(from, f.guestMAC) || !many && !bytes.Equal(to, f.gatewayMAC) {
		return false
	}
	switch kind {
	case etherTypeIPv6:
		return f.admitIPv6(frame[ethernetHeader:])
	case etherTypeARP:
		// The stack would answer for every address, also for the guest's own, which the
		// guest would then take for taken.
		target := frame[ethernetHeader:]
		return len(target) >= arpLength && netip.AddrFrom4([4]byte(target[arpTarget:])) == f.gateway
	case etherTypeIPv4:
		return f.admitIPv4(frame[ethernetHeader:])
	}
	return false
}

func (f filter) admitIPv4(packet []byte) bool {
	if len(packet) < ipv4MinHeader {
		return false
	}
	header := 4 * int(packet[0]&0x0f)
	if header < ipv4MinHeader || len(packet) < header {
		return false
	}
	protocol := packet[9]
	from, to := netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
	if to == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return protocol == protocolUDP && f.isDHCP(packet, header)
	}
	if from != f.guest {
		return false
	}
	if to != f.gateway {
		// The stack would answer a ping itself, whether the address is there or not.
		return protocol == protocolTCP || protocol == protocolUDP
	}
	return protocol != protocolUDP || isFragment(packet) || port(packet, header) != dhcpServerPort || f.isDHCP(packet, header)
}

// Of IPv6 (RFC 8200) and the discovery of neighbors (RFC 4861).
const (
	ipv6Header     = 40
	protocolICMPv6 = 58
	icmpv6Echo     = 128
	ndSolicitation = 135
	ndAdvertised   = 136
	ndTarget       = 8 // in the message
)

// admitIPv6 lets TCP and UDP of the guest's address in, without extension headers, so without
// fragments, pings to the gateway, and what neighbors must say to find each other.
func (f filter) admitIPv6(packet []byte) bool {
	if !f.guest6.IsValid() || len(packet) < ipv6Header {
		return false
	}
	from, to := netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
	switch packet[6] {
	case protocolTCP, protocolUDP:
		return from == f.guest6 && !to.IsMulticast()
	case protocolICMPv6:
	default:
		return false
	}
	message := packet[ipv6Header:]
	switch {
	case len(message) == 0 || from != f.guest6 && !from.IsLinkLocalUnicast():
		return false
	case message[0] == icmpv6Echo:
		return from == f.guest6 && to == f.gateway6
	case len(message) < ndTarget+16:
		return false
	}
	target := netip.AddrFrom16([16]byte(message[ndTarget : ndTarget+16]))
	// The stack would answer for every address.
	return message[0] == ndSolicitation && target == f.gateway6 || message[0] == ndAdvertised && target == f.guest6
}

// isDHCP reports whether the packet is for the DHCP server and about this guest.
func (f filter) isDHCP(packet []byte, header int) bool {
	address := header + udpHeader + dhcpHWAddr
	return !isFragment(packet) && port(packet, header) == dhcpServerPort &&
		len(packet) >= address+macLength && bytes.Equal(packet[address:address+macLength], f.guestMAC)
}

// port is the port that a TCP or UDP packet goes to; 0 if it has none.
func port(packet []byte, header int) int {
	if len(packet) < header+4 {
		return 0
	}
	return int(binary.BigEndian.Uint16(packet[header+2:]))
}

func isFragment(packet []byte) bool {
	return binary.BigEndian.Uint16(packet[6:])&(ipv4More|ipv4Offset) != 0
}
