package tapnet

import (
	"context"
	"io"
	"net"

	"github.com/smolvm/smolvm/internal/stream"
)

// maxSessions bounds the sessions of all UDP forwards of a guest.
const maxSessions = 256

// Forward implements [network.Attachment].
func (n *Network) Forward(listener net.Listener, guestPort int) io.Closer {
	// Closing the forward ends its connections, so they need not be kept one by one, and the
	// kernel can move their bytes by itself.
	dial := func(ctx context.Context) (net.Conn, error) { return n.dial(ctx, "tcp4", guestPort) }
	return n.open.Keep(stream.Forward(listener, dial))
}

// ForwardPackets implements [network.Attachment].
func (n *Network) ForwardPackets(conn *net.UDPConn, guestPort int) io.Closer {
	dial := func() (net.Conn, error) { return n.dial(context.Background(), "udp4", guestPort) }
	return n.open.Keep(stream.ForwardPackets(conn, &n.sessions, dial))
}
