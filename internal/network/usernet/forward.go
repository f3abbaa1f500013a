package usernet

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// acceptPause is how long a listener rests after it could not accept.
const acceptPause = 50 * time.Millisecond

// Forward connects each connection of a listener to a port of the guest. Closing
// what it returns closes the listener and its connections.
func (n *Network) Forward(listener net.Listener, guestPort int) io.Closer {
	f := &forward{network: n, listener: listener, guestPort: guestPort}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.running.Go(func() {
		Accept(f.ctx, listener, func(conn net.Conn) {
			f.running.Go(func() { f.serve(conn) })
		})
	})
	if !n.track(f) {
		_ = f.Close()
	}
	return f
}

// forward is one port forward.
type forward struct {
	network   *Network
	listener  net.Listener
	guestPort int
	ctx       context.Context // ends with the forward
	cancel    context.CancelFunc
	running   sync.WaitGroup // the listener, and its connections
}

// Close implements [io.Closer]. It returns when nothing of the forward runs any more.
func (f *forward) Close() error {
	f.cancel()
	err := f.listener.Close()
	f.network.untrack(f)
	f.running.Wait()
	return err
}

func (f *forward) serve(conn net.Conn) {
	guest, err := f.network.DialGuest(f.ctx, f.guestPort)
	if err != nil {
		_ = conn.Close()
		return
	}
	Splice(f.ctx, conn, guest)
}

// Accept hands out the connections of a listener until it is closed, or ctx is done.
func Accept(ctx context.Context, listener net.Listener, handle func(net.Conn)) {
	for {
		conn, err := listener.Accept()
		if err == nil {
			handle(conn)
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// Out of files, most likely. Nothing tells when there are some again.
		select {
		case <-time.After(acceptPause):
		case <-ctx.Done():
			return
		}
	}
}

// Splice copies between two connections until both directions have ended, or ctx is
// done, then closes both. The end of one direction is passed on by closing the other
// connection for writing; that one was broken off, by breaking off the other: whoever
// reads from it must not take what came for all there was.
func Splice(ctx context.Context, a, b net.Conn) {
	closeBoth := func() { _, _ = a.Close(), b.Close() }
	defer context.AfterFunc(ctx, closeBoth)()
	defer closeBoth()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		both.Go(func() {
			_, err := io.Copy(way[0], way[1])
			half, ok := way[0].(interface{ CloseWrite() error })
			switch {
			case err != nil:
				abort(a)
				abort(b)
			case ok:
				_ = half.CloseWrite()
			default: // it can't be half closed: end the other direction as well
				closeBoth()
			}
		})
	}
	both.Wait()
}

// abort closes a connection so that its other end can tell that from a proper end, if that
// is possible with it.
func abort(conn net.Conn) {
	switch c := conn.(type) {
	case interface{ Abort() }:
		c.Abort()
		return
	case interface{ SetLinger(seconds int) error }:
		_ = c.SetLinger(0) // makes closing send a reset, see socket(7)
	}
	_ = conn.Close()
}
