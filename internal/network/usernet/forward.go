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
	f := &forward{network: n, Closer: stream.Forward(listener, dial)}
	if !n.track(f) {
		_ = f.Close()
	}
	return f
}

// forward is one port forward.
type forward struct {
	network *Network
	io.Closer
}

// Close implements [io.Closer]. It returns when nothing of the forward runs any more.
func (f *forward) Close() error {
	f.network.untrack(f)
	return f.Closer.Close()
}
