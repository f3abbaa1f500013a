package usernet

import (
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/outbound"
)

// maxDials bounds the guest's TCP connections that are being set up.
const maxDials = 64

// connectOutside gives the guest a way out for what the stack itself does not serve.
func (n *Network) connectOutside() {
	conns := &kind{account: n.account, limit: n.limits.outgoing}
	n.outbound, n.problem = outbound.New(outbound.Config{
		Inside: []netip.Prefix{n.config.Prefix.Masked(), network.ULA()}, Metadata: n.config.Metadata, Egress: n.config.Egress,
	})
	connect := func(request *tcp.ForwarderRequest) { // in a goroutine of its own
		place, err := conns.reserve()
		if err != nil {
			request.Complete(true)
			return
		}
		n.outbound.Connect(destination(request.ID()), &tcpRequest{place: place, request: request})
	}
	send := func(id stack.TransportEndpointID, packet *stack.PacketBuffer) bool {
		first, _ := packet.Data().PullUp(packet.Data().Size())
		request := udp.NewForwarderRequest(n.stack, id, packet.Clone())
		return n.outbound.Send(destination(id), first, func() (net.Conn, error) {
			var queue waiter.Queue
			endpoint, failed := request.CreateEndpoint(&queue)
			if failed != nil {
				return nil, stackError(failed)
			}
			return gonet.NewUDPConn(&queue, endpoint), nil
		})
	}
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(n.stack, tcpBuffer, maxDials, connect).HandlePacket)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, send)
}

func destination(id stack.TransportEndpointID) netip.AddrPort {
	addr, _ := netip.AddrFromSlice(id.LocalAddress.AsSlice())
	return netip.AddrPortFrom(addr, id.LocalPort)
}

// tcpRequest is a connection that the guest has asked for, with its place in the account.
type tcpRequest struct {
	place   *reservation
	request *tcp.ForwarderRequest
}

// Accept implements [outbound.Request].
func (r *tcpRequest) Accept() (outbound.GuestConn, error) {
	var queue waiter.Queue
	endpoint, failed := r.request.CreateEndpoint(&queue)
	r.request.Complete(false)
	if failed != nil {
		r.place.release()
		return nil, stackError(failed)
	}
	return r.place.conn(endpoint, &queue), nil
}

// Refuse implements [outbound.Request].
func (r *tcpRequest) Refuse() {
	r.place.release()
	r.request.Complete(true)
}
