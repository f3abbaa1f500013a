package usernet

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func parseMAC(text string) net.HardwareAddr {
	address, err := net.ParseMAC(text)
	if err != nil {
		panic(err) // the test is wrong
	}
	return address
}

// ethernet makes a frame from the guest to the gateway.
func ethernet(config Config, kind uint16, payload []byte) []byte {
	frame := append(parseMAC(gatewayMAC), parseMAC(config.GuestMAC)...)
	frame = binary.BigEndian.AppendUint16(frame, kind)
	return append(frame, payload...)
}

// arpRequest is the guest's question for the gateway.
func arpRequest(config Config) []byte {
	arp := header.ARP(make([]byte, header.ARPSize))
	arp.SetIPv4OverEthernet()
	arp.SetOp(header.ARPRequest)
	copy(arp.HardwareAddressSender(), parseMAC(config.GuestMAC))
	copy(arp.ProtocolAddressSender(), config.Guest.AsSlice())
	copy(arp.ProtocolAddressTarget(), config.Gateway.AsSlice())
	return ethernet(config, etherTypeARP, arp)
}

// ipPacket makes an IPv4 packet.
func ipPacket(from, to netip.Addr, protocol tcpip.TransportProtocolNumber, payload []byte) []byte {
	ip := header.IPv4(make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+len(payload)))
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(header.IPv4MinimumSize + len(payload)),
		TTL:         64,
		Protocol:    uint8(protocol),
		SrcAddr:     tcpip.AddrFrom4(from.As4()),
		DstAddr:     tcpip.AddrFrom4(to.As4()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	return append(ip, payload...)
}

// udpPacket makes a UDP packet, without a checksum.
func udpPacket(from, to netip.AddrPort, payload []byte) []byte {
	udp := header.UDP(make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+len(payload)))
	udp.Encode(&header.UDPFields{
		SrcPort: from.Port(), DstPort: to.Port(), Length: uint16(header.UDPMinimumSize + len(payload)),
	})
	return ipPacket(from.Addr(), to.Addr(), header.UDPProtocolNumber, append(udp, payload...))
}

// tcpPacket makes a TCP packet.
func tcpPacket(from, to netip.AddrPort, flags header.TCPFlags) []byte {
	return tcpSegment(from, to, flags, 1, 0)
}

// tcpSegment makes a TCP packet with a number and an acknowledgement.
func tcpSegment(from, to netip.AddrPort, flags header.TCPFlags, number, acknowledged uint32) []byte {
	tcp := header.TCP(make([]byte, header.TCPMinimumSize))
	tcp.Encode(&header.TCPFields{
		SrcPort: from.Port(), DstPort: to.Port(), SeqNum: number, AckNum: acknowledged,
		DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535,
	})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber,
		tcpip.AddrFrom4(from.Addr().As4()), tcpip.AddrFrom4(to.Addr().As4()), header.TCPMinimumSize)
	tcp.SetChecksum(^tcp.CalculateChecksum(checksum.Combine(sum, 0)))
	return ipPacket(from.Addr(), to.Addr(), header.TCPProtocolNumber, tcp)
}

var (
	anywhere  = netip.MustParseAddr("0.0.0.0")
	everybody = netip.MustParseAddr("255.255.255.255")
)

// dhcpDiscover is how a client begins.
func dhcpDiscover(t testing.TB, config Config, client string) []byte {
	t.Helper()
	discover, err := dhcpv4.NewDiscovery(parseMAC(client), dhcpv4.WithBroadcast(true))
	if err != nil {
		t.Fatal(err)
	}
	frame := ethernet(config, etherTypeIPv4, udpPacket(
		netip.AddrPortFrom(anywhere, 68), netip.AddrPortFrom(everybody, dhcpServerPort), discover.ToBytes()))
	copy(frame, parseMAC("ff:ff:ff:ff:ff:ff"))
	return frame
}

// fragments makes of a broadcast over UDP two fragments of the same, to the gateway.
func fragments(config Config, frame []byte) [][]byte {
	packet := frame[ethernetHeader:]
	payload := packet[ipv4MinHeader:]
	const first = 64 // a multiple of 8
	var frames [][]byte
	for i, part := range [][]byte{payload[:first], payload[first:]} {
		fragment := header.IPv4(ipPacket(config.Guest, config.Gateway, header.UDPProtocolNumber, part))
		fragment.SetFlagsFragmentOffset(uint8(1-i), uint16(i*first)) // 1: more follow
		fragment.SetID(7)
		fragment.SetChecksum(0)
		fragment.SetChecksum(^fragment.CalculateChecksum())
		frames = append(frames, ethernet(config, etherTypeIPv4, fragment))
	}
	return frames
}

func TestDHCP(t *testing.T) {
	n := newNetwork(t)
	link := linkConn(t, n)
	config := testConfig()
	// The first one must go unanswered: it would take another address.
	stranger := "02:00:00:00:00:99"
	frames := [][]byte{arpRequest(config), dhcpDiscover(t, config, stranger)} // the first: so that it can be answered
	frames = append(frames, fragments(config, dhcpDiscover(t, config, stranger))...)
	for _, frame := range append(frames, dhcpDiscover(t, config, config.GuestMAC)) {
		if _, err := link.Write(frame); err != nil {
			t.Fatal(err)
		}
	}
	if err := link.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, 2048)
	for {
		size, err := link.Read(frame)
		if err != nil {
			t.Fatalf("wait for an offer: %v", err)
		}
		headers := ethernetHeader + header.IPv4MinimumSize + header.UDPMinimumSize
		if size < headers || frame[ethernetHeader+9] != protocolUDP {
			continue
		}
		offer, err := dhcpv4.FromBytes(frame[headers:size])
		if err != nil {
			t.Fatalf("parse the offer: %v", err)
		}
		if offer.ClientHWAddr.String() == stranger {
			t.Error("another than the guest is offered an address")
		}
		got, _ := netip.AddrFromSlice(offer.YourIPAddr.To4())
		if got != config.Guest || offer.MessageType() != dhcpv4.MessageTypeOffer {
			t.Errorf("%s of %s, want an offer of %s", offer.MessageType(), got, config.Guest)
		}
		if router := offer.Router(); len(router) != 1 || router[0].String() != config.Gateway.String() {
			t.Errorf("router is %s, want %s", router, config.Gateway)
		}
		return
	}
}

func TestAnswerDHCP(t *testing.T) {
	config := testConfig()
	config.MTU = 4000
	asking := func(kind dhcpv4.MessageType, options ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
		request, err := dhcpv4.New(append(options, dhcpv4.WithMessageType(kind), dhcpv4.WithHwAddr(parseMAC(config.GuestMAC)))...)
		if err != nil {
			t.Fatal(err)
		}
		return request
	}
	wanting := func(ip string) dhcpv4.Modifier {
		return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(ip)))
	}
	for _, test := range []struct {
		name    string
		request *dhcpv4.DHCPv4
		want    dhcpv4.MessageType // 0: no answer
		leased  string
	}{
		{"discover", asking(dhcpv4.MessageTypeDiscover), dhcpv4.MessageTypeOffer, "10.0.2.15"},
		{"discover, wanting another", asking(dhcpv4.MessageTypeDiscover, wanting("10.0.2.16")), dhcpv4.MessageTypeOffer, "10.0.2.15"},
		{"request", asking(dhcpv4.MessageTypeRequest, wanting("10.0.2.15")), dhcpv4.MessageTypeAck, "10.0.2.15"},
		{"renew", asking(dhcpv4.MessageTypeRequest, dhcpv4.WithClientIP(net.ParseIP("10.0.2.15"))), dhcpv4.MessageTypeAck, "10.0.2.15"},
		{"request another", asking(dhcpv4.MessageTypeRequest, wanting("10.0.2.16")), dhcpv4.MessageTypeNak, "0.0.0.0"},
		{"inform", asking(dhcpv4.MessageTypeInform), dhcpv4.MessageTypeAck, "0.0.0.0"},
		{"release", asking(dhcpv4.MessageTypeRelease), 0, ""},
		{"nothing", asking(dhcpv4.MessageTypeNone), 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			reply := answerDHCP(config, test.request, []string{"corp.example", "lab.example"})
			if (reply == nil) != (test.want == 0) {
				t.Fatalf("reply is %v, want %s", reply, test.want)
			}
			if reply == nil {
				return
			}
			if reply.MessageType() != test.want || reply.YourIPAddr.String() != test.leased {
				t.Errorf("%s of %s, want %s of %s", reply.MessageType(), reply.YourIPAddr, test.want, test.leased)
			}
			if test.want == dhcpv4.MessageTypeNak {
				return
			}
			mtu := binary.BigEndian.Uint16(reply.Options.Get(dhcpv4.OptionInterfaceMTU))
			if mtu != 4000 || reply.SubnetMask().String() != "ffffff00" || reply.DNS()[0].String() != config.Gateway.String() {
				t.Errorf("options are %s", reply.Options)
			}
			if got := reply.DomainSearch(); got == nil || !slices.Equal(got.Labels, []string{"corp.example", "lab.example"}) || reply.DomainName() != "corp.example" {
				t.Errorf("domains are %v, %q", got, reply.DomainName())
			}
		})
	}
}

func TestSearchOption(t *testing.T) {
	long := strings.Repeat("a23456789.", 12) + "example"
	for want, domains := range map[int][]string{0: nil, 2: {"a.example", "b.example"}, 1: {long, long + "x", "c"}} {
		if got := searchOption(domains); len(got) != want {
			t.Errorf("%d of %q fit, want %d", len(got), domains, want)
		}
	}
}

func TestFilter(t *testing.T) {
	config := testConfig()
	f, err := newFilter(config)
	if err != nil {
		t.Fatal(err)
	}
	outside := netip.MustParseAddr("192.0.2.1")
	at := func(addr netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(addr, port) }
	ip := func(packet []byte) []byte { return ethernet(config, etherTypeIPv4, packet) }
	changed := func(frame []byte, offset int, b ...byte) []byte {
		copy(frame[offset:], b)
		return frame
	}
	for _, test := range []struct {
		name  string
		frame []byte
		want  bool
	}{
		{"empty", nil, false},
		{"short", make([]byte, ethernetHeader-1), false},
		{"ARP", arpRequest(config), true},
		{"ARP from another MAC", changed(arpRequest(config), macLength, 2, 0, 0, 0, 0, 9), false},
		{"ARP to another MAC", changed(arpRequest(config), 0, 2, 0, 0, 0, 0, 9), false},
		{"ARP for another address", changed(arpRequest(config), ethernetHeader+arpTarget, config.Guest.AsSlice()...), false},
		{"ARP cut short", arpRequest(config)[:ethernetHeader+arpTarget+3], false},
		{"IPv6", ethernet(config, 0x86dd, make([]byte, 60)), false},
		{"VLAN", ethernet(config, 0x8100, make([]byte, 60)), false},
		{"IPv4 cut short", ip(make([]byte, ipv4MinHeader-1)), false},
		{"IPv4 with a header that is too short", ip(changed(udpPacket(at(config.Guest, 1), at(outside, 1), nil), 0, 0x44)), false},
		{"IPv4 with a header longer than itself", ip(changed(udpPacket(at(config.Guest, 1), at(outside, 1), nil), 0, 0x4f)), false},
		{"UDP to outside", ip(udpPacket(at(config.Guest, 1), at(outside, 1), nil)), true},
		{"UDP from another address", ip(udpPacket(at(outside, 1), at(outside, 1), nil)), false},
		{"UDP from no address", ip(udpPacket(at(anywhere, 1), at(outside, 1), nil)), false},
		{"TCP to outside", ip(tcpPacket(at(config.Guest, 1), at(outside, 1), header.TCPFlagSyn)), true},
		{"TCP to everybody", ip(tcpPacket(at(config.Guest, 1), at(everybody, 1), header.TCPFlagSyn)), false},
		{"ping to gateway", ip(ipPacket(config.Guest, config.Gateway, header.ICMPv4ProtocolNumber, make([]byte, 8))), true},
		{"ping to outside", ip(ipPacket(config.Guest, outside, header.ICMPv4ProtocolNumber, make([]byte, 8))), false},
		{"DNS", ip(udpPacket(at(config.Guest, 1), at(config.Gateway, dnsPort), make([]byte, 12))), true},
		{"fragment to gateway", ip(changed(udpPacket(at(config.Guest, 1), at(config.Gateway, dnsPort), nil), 6, 0x20, 0)), true},
		{"DHCP", dhcpDiscover(t, config, config.GuestMAC), true},
		{"DHCP for another", dhcpDiscover(t, config, "02:00:00:00:00:99"), false},
		{"DHCP for another, to gateway", ip(udpPacket(at(config.Guest, 68), at(config.Gateway, dhcpServerPort), make([]byte, 240))), false},
		{"UDP to everybody", ip(udpPacket(at(config.Guest, 1), at(everybody, 1), nil)), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := f.admit(test.frame); got != test.want {
				t.Errorf("admit: %t, want %t", got, test.want)
			}
		})
	}
}

func TestFilterIPv6(t *testing.T) {
	addr := netip.MustParseAddr
	config := testConfig()
	config.Prefix6, config.Gateway6, config.Guest6 = netip.MustParsePrefix("fd00::/96"), addr("fd00::1"), addr("fd00::2")
	f, err := newFilter(config)
	if err != nil {
		t.Fatal(err)
	}
	outside, local, node := addr("2001:db8::1"), addr("fe80::2"), addr("ff02::1:ff00:1")
	packet := func(from, to netip.Addr, protocol byte, payload []byte) []byte {
		p := make([]byte, ipv6Header, ipv6Header+len(payload))
		p[0], p[6], p[7] = 0x60, protocol, 64
		binary.BigEndian.PutUint16(p[4:], uint16(len(payload)))
		copy(p[8:], from.AsSlice())
		copy(p[24:], to.AsSlice())
		return ethernet(config, etherTypeIPv6, append(p, payload...))
	}
	neighbor := func(kind byte, target netip.Addr) []byte {
		return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
	}
	to := func(frame []byte, mac ...byte) []byte {
		copy(frame, mac)
		return frame
	}
	const hopByHop, fragment, routerSolicitation, redirect = 0, 44, 133, 137
	for name, test := range map[string]struct {
		frame []byte
		want  bool
	}{
		"TCP":                             {packet(config.Guest6, outside, protocolTCP, make([]byte, 20)), true},
		"UDP":                             {packet(config.Guest6, outside, protocolUDP, make([]byte, 8)), true},
		"from another address":            {packet(addr("fd00::3"), outside, protocolUDP, make([]byte, 8)), false},
		"from a local address":            {packet(local, outside, protocolUDP, make([]byte, 8)), false},
		"to many":                         {packet(config.Guest6, addr("ff02::fb"), protocolUDP, make([]byte, 8)), false},
		"ping to the gateway":             {packet(config.Guest6, config.Gateway6, protocolICMPv6, []byte{icmpv6Echo, 0, 0, 0}), true},
		"ping to outside":                 {packet(config.Guest6, outside, protocolICMPv6, []byte{icmpv6Echo, 0, 0, 0}), false},
		"looks for the gateway":           {to(packet(config.Guest6, node, protocolICMPv6, neighbor(ndSolicitation, config.Gateway6)), 0x33, 0x33, 0xff, 0, 0, 1), true},
		"looks for it by a local address": {packet(local, config.Gateway6, protocolICMPv6, neighbor(ndSolicitation, config.Gateway6)), true},
		"looks for another":               {packet(config.Guest6, node, protocolICMPv6, neighbor(ndSolicitation, outside)), false},
		"looks for itself":                {packet(addr("::"), node, protocolICMPv6, neighbor(ndSolicitation, config.Guest6)), false},
		"is found":                        {packet(config.Guest6, config.Gateway6, protocolICMPv6, neighbor(ndAdvertised, config.Guest6)), true},
		"is found as another":             {packet(config.Guest6, config.Gateway6, protocolICMPv6, neighbor(ndAdvertised, outside)), false},
		"router solicitation":             {packet(local, addr("ff02::2"), protocolICMPv6, neighbor(routerSolicitation, config.Gateway6)), false},
		"redirect":                        {packet(config.Guest6, config.Gateway6, protocolICMPv6, neighbor(redirect, config.Gateway6)), false},
		"neighbors, cut short":            {packet(config.Guest6, node, protocolICMPv6, neighbor(ndSolicitation, config.Gateway6)[:20]), false},
		"no message":                      {packet(config.Guest6, config.Gateway6, protocolICMPv6, nil), false},
		"fragment":                        {packet(config.Guest6, outside, fragment, make([]byte, 8)), false},
		"options":                         {packet(config.Guest6, outside, hopByHop, make([]byte, 8)), false},
		"cut short":                       {packet(config.Guest6, outside, protocolUDP, nil)[:ethernetHeader+ipv6Header-1], false},
		"to another MAC":                  {to(packet(config.Guest6, outside, protocolUDP, make([]byte, 8)), 2), false},
		"IPv4 to many of IPv6":            {to(ethernet(config, etherTypeIPv4, udpPacket(netip.AddrPortFrom(config.Guest, 1), netip.MustParseAddrPort("192.0.2.1:1"), nil)), 0x33, 0x33), false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := f.admit(test.frame); got != test.want {
				t.Errorf("admit: %t, want %t", got, test.want)
			}
		})
	}
	config.Gateway6 = outside
	if _, err := newFilter(config); err == nil {
		t.Error("a gateway beyond the network is taken")
	}
}

// seeds are frames that a guest might send, and broken ones.
func seeds(t testing.TB) [][]byte {
	config := testConfig()
	outside := netip.MustParseAddrPort("127.0.0.1:9") // refused, so nothing leaves the host
	guest := netip.AddrPortFrom(config.Guest, 1024)
	frames := [][]byte{arpRequest(config), dhcpDiscover(t, config, config.GuestMAC)}
	for _, packet := range [][]byte{
		udpPacket(guest, outside, []byte("hello")),
		udpPacket(guest, netip.AddrPortFrom(config.Gateway, dnsPort), make([]byte, 12)),
		udpPacket(guest, netip.AddrPortFrom(config.Gateway, dhcpServerPort), make([]byte, 300)),
		tcpPacket(guest, outside, header.TCPFlagSyn),
		tcpPacket(guest, netip.AddrPortFrom(config.Gateway, dnsPort), header.TCPFlagSyn),
		tcpPacket(guest, netip.AddrPortFrom(config.Gateway, dnsPort), 0xff),
		ipPacket(config.Guest, config.Gateway, header.ICMPv4ProtocolNumber, []byte{8, 0, 0, 0, 0, 1, 0, 1}),
		ipPacket(config.Guest, config.Gateway, header.ICMPv4ProtocolNumber, append([]byte{3, 4, 0, 0, 0, 0, 0, 1}, make([]byte, 28)...)),
		ipPacket(config.Guest, config.Gateway, 2, make([]byte, 8)),
	} {
		frame := ethernet(config, etherTypeIPv4, packet)
		frames = append(frames, frame, frame[:len(frame)-3], frame[:ethernetHeader+ipv4MinHeader])
	}
	return frames
}

// Whatever a guest sends, the network goes on to work.
func FuzzFrames(f *testing.F) {
	for _, frame := range seeds(f) {
		f.Add(frame)
	}
	config := testConfig()
	n, err := New(config)
	if err != nil {
		f.Fatal(err)
	}
	link := linkConn(f, n)
	f.Cleanup(func() { _ = n.Close() })
	answer := make([]byte, 1<<17)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) >= 2*macLength {
			// Most of what the fuzzer makes would not get past the filter.
			copy(frame, parseMAC(gatewayMAC))
			copy(frame[macLength:], parseMAC(config.GuestMAC))
		}
		if len(frame) > 1<<16 || isOutward(frame) {
			t.Skip()
		}
		for _, sent := range [][]byte{frame, arpRequest(config)} {
			if _, err := link.Write(sent); err != nil {
				t.Fatal(err)
			}
		}
		// The answer to the second comes after all that the first brings about at once.
		if err := link.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		for {
			size, err := link.Read(answer)
			if err != nil {
				t.Fatalf("the gateway does not answer any more: %v", err)
			}
			if size > ethernetHeader && binary.BigEndian.Uint16(answer[12:]) == etherTypeARP &&
				header.ARP(answer[ethernetHeader:size]).Op() == header.ARPReply {
				return
			}
		}
	})
}

// isOutward reports whether a frame might make the host send something.
func isOutward(frame []byte) bool {
	if len(frame) < ethernetHeader+ipv4MinHeader || binary.BigEndian.Uint16(frame[2*macLength:]) != etherTypeIPv4 {
		return false
	}
	to := netip.AddrFrom4([4]byte(frame[ethernetHeader+16 : ethernetHeader+20]))
	return to.IsGlobalUnicast() && to != testConfig().Gateway
}
