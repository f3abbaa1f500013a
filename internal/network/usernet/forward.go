package usernet

import (
	"context"
	"io"
	"net"

	"github.com/smolvm/smolvm/internal/stream"
)

// Forward connects each connection of a listener to one to a TCP port of the guest. Closing
// what it returns closes the listener and its connections.
func (n *Network) Forward(listener net.Listener, guestPort int) io.Closer {
	dial := func(ctx context.Context) (net.Conn, error) { return n.DialGuest(ctx, guestPort) }
	return n.open.Keep(stream.Forward(listener, dial))
}
