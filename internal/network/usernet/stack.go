package usernet

import (
	"errors"
	"net"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const (
	// gatewayMAC is what the guest sees of the host. Each VM has a network of its
	// own, so all may see the same; locally administered, with QEMU's prefix.
	gatewayMAC = "52:55:0a:00:02:02"
	// nicID is the stack's only interface.
	nicID = 1
	// tcpBuffer bounds what one direction of a connection holds, in bytes. The link
	// has no latency to speak of, so more would only be more memory for a guest to
	// fill.
	tcpBuffer = 256 << 10
)

// build makes the stack, its services, and the way out, and connects them to the
// link. The stack is that of gVisor, as in containers/gvisor-tap-vsock. That is not
// used itself: its network can't be shut down, it lets a guest reach the host and take
// as much of its memory as it likes, and it costs each process 6 MB and 4 ms, for
// tables that it prints packets by.
func (n *Network) build(mac net.HardwareAddr) (err error) {
	link := &endpoint{conn: n.conn, mtu: uint32(n.config.MTU), mac: mac, admit: n.admit}
	if n.stack, err = newStack(n.config, link); err != nil {
		return err
	}
	n.endpoint = link
	n.setRate(n.config.Rate)
	n.connectOutside()
	if err := n.serveDNS(); err != nil {
		return err
	}
	leases, err := listenDHCP(n.stack)
	if err != nil {
		return err
	}
	n.services = append(n.services, leases)
	n.running.Go(func() { n.serveDHCP(leases) })
	n.running.Go(link.serve)
	return nil
}

func newStack(config Config, endpoint stack.LinkEndpoint) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol, arp.NewProtocol,
			// Without addresses that it makes itself, and without looking for routers.
			ipv6.NewProtocolWithOptions(ipv6.Options{NDPConfigs: ipv6.NDPConfigurations{}, AutoGenLinkLocal: false}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: tcpBuffer}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: tcpBuffer}
	// A connection that has ended is remembered for late packets of it not to be taken for
	// another's (RFC 9293, section 3.6.1). Nothing is late on a socket pair.
	timeWait := tcpip.TCPTimeWaitTimeoutOption(100 * time.Millisecond)
	gateway := tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddrFrom4(config.Gateway.As4()).WithPrefix(),
	}
	prefix := config.Prefix.Masked()
	subnet, err := tcpip.NewSubnet(tcpip.AddrFrom4(prefix.Addr().As4()), tcpip.MaskFromBytes(net.CIDRMask(prefix.Bits(), 32)))
	if err != nil {
		return nil, err
	}
	routes := []tcpip.Route{{Destination: subnet, NIC: nicID}}
	add6 := func() tcpip.Error {
		if !config.Guest6.IsValid() {
			return nil
		}
		prefix := config.Prefix6.Masked()
		address := tcpip.ProtocolAddress{
			Protocol:          ipv6.ProtocolNumber,
			AddressWithPrefix: tcpip.AddrFrom16(config.Gateway6.As16()).WithPrefix(),
		}
		subnet, err := tcpip.NewSubnet(tcpip.AddrFrom16(prefix.Addr().As16()), tcpip.MaskFromBytes(net.CIDRMask(prefix.Bits(), 128)))
		if err != nil {
			return &tcpip.ErrBadAddress{}
		}
		routes = append(routes, tcpip.Route{Destination: subnet, NIC: nicID})
		return s.AddProtocolAddress(nicID, address, stack.AddressProperties{})
	}
	for _, err := range []tcpip.Error{
		s.SetTransportProtocolOption(tcp.ProtocolNumber, &receive),
		s.SetTransportProtocolOption(tcp.ProtocolNumber, &send),
		s.SetTransportProtocolOption(tcp.ProtocolNumber, &timeWait),
		s.CreateNIC(nicID, endpoint),
		s.AddProtocolAddress(nicID, gateway, stack.AddressProperties{}),
		add6(),
		// The stack stands in for every address of the outside: it takes packets to
		// them, and answers from them.
		s.SetPromiscuousMode(nicID, true),
		s.SetSpoofing(nicID, true),
	} {
		if err != nil {
			s.Destroy()
			return nil, stackError(err)
		}
	}
	s.SetRouteTable(routes)
	return s, nil
}

// stackError makes an error of one of gVisor's.
func stackError(err tcpip.Error) error { return errors.New(err.String()) }

// serveDNS answers at the gateway, over UDP and TCP.
func (n *Network) serveDNS() error {
	address := tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(n.config.Gateway.As4()), Port: dnsPort}
	packets, err := gonet.DialUDP(n.stack, &address, nil, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	n.services = append(n.services, packets)
	listener, err := (&kind{account: n.account, limit: n.limits.names}).listen(n.stack, address)
	if err != nil {
		return err
	}
	n.services = append(n.services, listener, n.names)
	for _, server := range []*dns.Server{
		{PacketConn: packets, Handler: n.names},
		{Listener: listener, Handler: n.names},
	} {
		n.running.Go(func() { _ = server.ActivateAndServe() })
	}
	return nil
}
