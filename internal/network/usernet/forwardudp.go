package usernet

import (
	"io"
	"net"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/smolvm/smolvm/internal/stream"
)

// maxSessions bounds the sessions of all UDP forwards of a guest.
const maxSessions = 256

// ForwardPackets takes the datagrams that come to a socket to a UDP port of the guest, and
// the guest's answers back; see [stream.ForwardPackets].
func (n *Network) ForwardPackets(conn *net.UDPConn, guestPort int) io.Closer {
	address := tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(n.config.Guest.As4()), Port: uint16(guestPort)}
	dial := func() (net.Conn, error) { return gonet.DialUDP(n.stack, nil, &address, ipv4.ProtocolNumber) }
	return n.open.Keep(stream.ForwardPackets(conn, &n.sessions, dial))
}
