package vmmfake

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// guestNetwork is the guest's TCP/IP stack on its interface: that of gVisor, which the
// host's end is made with too.
type guestNetwork struct {
	link net.Conn // nil: there is no interface

	mu      sync.Mutex // guards the following
	config  wire.Network
	stack   *stack.Stack // nil: the interface is down
	address tcpip.Address
	stop    context.CancelFunc
}

const (
	nicID      = 1
	defaultMTU = 1500
	queued     = 256 // packets that wait for the link
)

// errNoNetwork is the error of who needs a network that is not up.
var errNoNetwork = errors.New("the network is down")

// adopt configures the interface, and has whatever comes to the port of SSH served.
func (n *guestNetwork) adopt(config wire.Network, serve func(net.Listener)) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.link == nil {
		return nil
	}
	if n.stack != nil {
		if n.config.MAC == config.MAC && n.config.Address == config.Address {
			return nil
		}
		n.stop()
		n.stack.Destroy()
	}
	mac, err := net.ParseMAC(config.MAC)
	if err != nil {
		return err
	}
	mtu := config.MTU
	if mtu == 0 {
		mtu = defaultMTU
	}
	packets := channel.New(queued, uint32(mtu), tcpip.LinkAddress(mac))
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
		HandleLocal:        true,
	})
	n.address = tcpip.AddrFrom4(config.Address.Addr().As4())
	for _, err := range []tcpip.Error{
		s.CreateNIC(nicID, ethernet.New(packets)),
		s.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
			Protocol:          ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: n.address, PrefixLen: config.Address.Bits()},
		}, stack.AddressProperties{}),
	} {
		if err != nil {
			return errors.New(err.String())
		}
	}
	subnet := tcpip.AddressWithPrefix{Address: n.address, PrefixLen: config.Address.Bits()}.Subnet()
	s.SetRouteTable([]tcpip.Route{
		{Destination: subnet, NIC: nicID},
		{Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFrom4(config.Gateway.As4()), NIC: nicID},
	})
	ctx, stop := context.WithCancel(context.Background())
	n.config, n.stack, n.stop = config, s, stop
	go n.receive(ctx, packets)
	go n.send(ctx, packets)
	listener, err := gonet.ListenTCP(s, tcpip.FullAddress{NIC: nicID, Port: wire.SSHPort}, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	go serve(listener)
	return nil
}

// receive hands frames of the link to the stack. The one that comes when the stack is
// replaced is lost, as happens to frames.
func (n *guestNetwork) receive(ctx context.Context, packets *channel.Endpoint) {
	frame := make([]byte, 64<<10)
	for {
		length, err := n.link.Read(frame)
		if err != nil || ctx.Err() != nil {
			return
		}
		packet := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame[:length])})
		packets.InjectInbound(0, packet)
		packet.DecRef()
	}
}

func (n *guestNetwork) send(ctx context.Context, packets *channel.Endpoint) {
	for {
		packet := packets.ReadContext(ctx)
		if packet == nil {
			return
		}
		view := packet.ToView()
		_, _ = n.link.Write(view.AsSlice())
		view.Release()
		packet.DecRef()
	}
}

func (n *guestNetwork) current() (*stack.Stack, tcpip.Address, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stack == nil {
		return nil, tcpip.Address{}, errNoNetwork
	}
	return n.stack, n.address, nil
}

// dial connects to an address; the loopback's is the guest's own.
func (n *guestNetwork) dial(ctx context.Context, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	to, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil {
		return nil, err
	}
	s, own, err := n.current()
	if err != nil {
		return nil, err
	}
	full := tcpip.FullAddress{NIC: nicID, Addr: own, Port: to.Port()}
	if !to.Addr().IsLoopback() {
		full.Addr = tcpip.AddrFrom4(to.Addr().As4())
	}
	return gonet.DialContextTCP(ctx, s, full, ipv4.ProtocolNumber)
}

// ping sends one echo request.
func (n *guestNetwork) ping(to netip.Addr) error {
	s, _, err := n.current()
	if err != nil {
		return err
	}
	var queue waiter.Queue
	endpoint, tcpErr := s.NewEndpoint(icmp.ProtocolNumber4, ipv4.ProtocolNumber, &queue)
	if tcpErr != nil {
		return errors.New(tcpErr.String())
	}
	defer endpoint.Close()
	request := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize))
	request.SetType(header.ICMPv4Echo)
	full := tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(to.As4())}
	if _, tcpErr := endpoint.Write(bytes.NewReader(request), tcpip.WriteOptions{To: &full}); tcpErr != nil {
		return errors.New(tcpErr.String())
	}
	return nil
}

// serveHTTP serves files at a port.
func (n *guestNetwork) serveHTTP(_ context.Context, port int, read func(name string) ([]byte, error)) error {
	s, _, err := n.current()
	if err != nil {
		return err
	}
	listener, err := gonet.ListenTCP(s, tcpip.FullAddress{NIC: nicID, Port: uint16(port)}, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := r.URL.Path
		if strings.HasSuffix(name, "/") {
			name += "index.html"
		}
		text, err := read(name)
		if errors.Is(err, fs.ErrNotExist) {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(text)
	})}
	go func() { _ = server.Serve(listener) }()
	return nil
}
