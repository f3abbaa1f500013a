package usernet

import (
	"bytes"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// leaseTime is long, as the address is the guest's for as long as it lives.
	leaseTime = 24 * time.Hour
	// maxDHCP is the longest message that a server need accept (RFC 2131, section 2).
	maxDHCP = 576
	// maxDHCPSearch is how much of the answer the domains to search may take, in bytes:
	// what an option holds, so that it need not be sent in parts.
	maxDHCPSearch = 255
	// dhcpClientPort is where clients listen.
	dhcpClientPort = 68
)

// listenDHCP opens the server's port.
func listenDHCP(s *stack.Stack) (*gonet.UDPConn, error) {
	var queue waiter.Queue
	endpoint, failed := s.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, &queue)
	if failed != nil {
		return nil, stackError(failed)
	}
	endpoint.SocketOptions().SetBroadcast(true)
	if failed := endpoint.Bind(tcpip.FullAddress{NIC: nicID, Port: dhcpServerPort}); failed != nil {
		endpoint.Close()
		return nil, stackError(failed)
	}
	return gonet.NewUDPConn(&queue, endpoint), nil
}

// serveDHCP answers until conn is closed. It is for guests that ask for their address;
// our agent does not: it is told.
func (n *Network) serveDHCP(conn net.PacketConn) {
	buffer := make([]byte, 2*maxDHCP)
	for {
		size, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		request, err := dhcpv4.FromBytes(buffer[:size])
		if err != nil {
			continue
		}
		// [filter] has not seen what came in fragments.
		if !bytes.Equal(request.ClientHWAddr, n.filter.Load().guestMAC) {
			continue
		}
		reply := answerDHCP(n.config, request, n.Search())
		if reply == nil {
			continue
		}
		to, ok := from.(*net.UDPAddr)
		if !ok || to.IP.IsUnspecified() {
			to = &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpClientPort}
		}
		_, _ = conn.WriteTo(reply.ToBytes(), to)
	}
}

// answerDHCP is what a server with one address to give says; nil: nothing. That the
// request is the guest's has been seen to.
func answerDHCP(config Config, request *dhcpv4.DHCPv4, search []string) *dhcpv4.DHCPv4 {
	guest, gateway := net.IP(config.Guest.AsSlice()), net.IP(config.Gateway.AsSlice())
	kind := dhcpv4.MessageTypeAck
	switch request.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeRequest:
		asked := request.RequestedIPAddress()
		if asked == nil {
			asked = request.ClientIPAddr
		}
		if !asked.Equal(guest) {
			kind = dhcpv4.MessageTypeNak
		}
	case dhcpv4.MessageTypeInform:
	default:
		return nil
	}
	options := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(gateway)),
	}
	if kind != dhcpv4.MessageTypeNak {
		options = append(options,
			dhcpv4.WithNetmask(net.CIDRMask(config.Prefix.Bits(), netip.IPv4Unspecified().BitLen())),
			dhcpv4.WithRouter(gateway),
			dhcpv4.WithDNS(gateway),
			dhcpv4.WithOption(dhcpv4.Option{Code: dhcpv4.OptionInterfaceMTU, Value: dhcpv4.Uint16(config.MTU)}),
		)
		if domains := searchOption(search); len(domains) > 0 {
			options = append(options, dhcpv4.WithDomainSearchList(domains...),
				dhcpv4.WithOption(dhcpv4.OptDomainName(domains[0])))
		}
		if request.MessageType() != dhcpv4.MessageTypeInform {
			options = append(options, dhcpv4.WithYourIP(guest), dhcpv4.WithLeaseTime(uint32(leaseTime/time.Second)))
		}
	}
	reply, err := dhcpv4.NewReplyFromRequest(request, options...)
	if err != nil {
		return nil
	}
	return reply
}

// searchOption is as many of the domains as fit into an option (RFC 3397).
func searchOption(domains []string) []string {
	for i := range domains {
		if (&rfc1035label.Labels{Labels: domains[:i+1]}).Length() > maxDHCPSearch {
			return domains[:i]
		}
	}
	return domains
}
