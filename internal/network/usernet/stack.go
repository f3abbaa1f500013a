package usernet

import (
	"context"
	"errors"
	"net"

	"github.com/containers/gvisor-tap-vsock/pkg/services/dhcp"
	"github.com/containers/gvisor-tap-vsock/pkg/services/dns"
	"github.com/containers/gvisor-tap-vsock/pkg/tap"
	"github.com/containers/gvisor-tap-vsock/pkg/types"
	"github.com/sirupsen/logrus"
	"golang.org/x/net/netutil"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
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
	// maxDNSConns bounds the guest's DNS connections over TCP.
	maxDNSConns = 16
)

// build makes the stack, its services, and the way out, and connects them to the
// link. The parts are those of gvisor-tap-vsock; they are put together here and not
// by its virtualnetwork package because that can't be shut down, and lets a guest
// reach the host itself and take as much of its memory as it likes.
func (n *Network) build(filter filter) error {
	// The library logs what it thinks of the guest's packets; a guest could fill the
	// disk with that.
	logrus.SetLevel(logrus.PanicLevel)
	endpoint, err := tap.NewLinkEndpoint(false, uint32(n.config.MTU), gatewayMAC, n.config.Gateway.String(), nil)
	if err != nil {
		return err
	}
	ethernet := tap.NewSwitch(false)
	endpoint.Connect(ethernet)
	ethernet.Connect(endpoint)
	if n.stack, err = newStack(n.config, endpoint); err != nil {
		return err
	}
	n.outbound = newOutbound(n.stack, n.config.Prefix)
	if err := n.serveDNS(); err != nil {
		return err
	}
	if err := n.serveDHCP(filter); err != nil {
		return err
	}
	// It returns when the link is closed, and the error says just that.
	n.running.Go(func() {
		_ = ethernet.Accept(context.Background(), guardedConn{n.conn, filter}, types.VfkitProtocol)
	})
	return nil
}

func newStack(config Config, endpoint stack.LinkEndpoint) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: tcpBuffer}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: tcpBuffer}
	gateway := tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddrFrom4(config.Gateway.As4()).WithPrefix(),
	}
	prefix := config.Prefix.Masked()
	subnet, err := tcpip.NewSubnet(tcpip.AddrFrom4(prefix.Addr().As4()), tcpip.MaskFromBytes(net.CIDRMask(prefix.Bits(), 32)))
	if err != nil {
		return nil, err
	}
	for _, err := range []tcpip.Error{
		s.SetTransportProtocolOption(tcp.ProtocolNumber, &receive),
		s.SetTransportProtocolOption(tcp.ProtocolNumber, &send),
		s.CreateNIC(nicID, endpoint),
		s.AddProtocolAddress(nicID, gateway, stack.AddressProperties{}),
		// The stack stands in for every address of the outside: it takes packets to
		// them, and answers from them.
		s.SetPromiscuousMode(nicID, true),
		s.SetSpoofing(nicID, true),
	} {
		if err != nil {
			s.Destroy()
			return nil, errors.New(err.String())
		}
	}
	s.SetRouteTable([]tcpip.Route{{Destination: subnet, NIC: nicID}})
	return s, nil
}

// serveDNS answers at the gateway, with names as the host resolves them.
func (n *Network) serveDNS() error {
	address := tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(n.config.Gateway.As4()), Port: dnsPort}
	packets, err := gonet.DialUDP(n.stack, &address, nil, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	n.services = append(n.services, packets)
	listener, err := gonet.ListenTCP(n.stack, address, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	n.services = append(n.services, listener)
	names := newResolver()
	n.services = append(n.services, names)
	server, err := dns.NewWithUpstreamResolver(packets, netutil.LimitListener(listener, maxDNSConns), nil, names)
	if err != nil {
		return err
	}
	n.running.Go(func() { _ = server.Serve() })
	n.running.Go(func() { _ = server.ServeTCP() })
	return nil
}

// serveDHCP gives the guest its address, for guests that ask. Our agent does not: it
// is told.
func (n *Network) serveDHCP(filter filter) error {
	prefix := n.config.Prefix.Masked()
	pool := tap.NewIPPool(&net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), 32)})
	pool.Reserve(net.IP(n.config.Gateway.AsSlice()), gatewayMAC)
	pool.Reserve(net.IP(n.config.Guest.AsSlice()), filter.guestMAC.String())
	server, err := dhcp.New(&types.Configuration{
		MTU:       n.config.MTU,
		Subnet:    prefix.String(),
		GatewayIP: n.config.Gateway.String(),
	}, n.stack, pool)
	if err != nil {
		return err
	}
	n.services = append(n.services, server.Underlying)
	n.running.Go(func() { _ = server.Serve() })
	return nil
}
