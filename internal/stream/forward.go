package stream

import (
	"context"
	"io"
	"net"
	"sync"
)

// Forward connects each connection of a listener to one that dial makes, until what it
// returns is closed: that closes the listener and all the connections, and returns when
// nothing of the forward runs any more.
func Forward(listener net.Listener, dial func(context.Context) (net.Conn, error)) io.Closer {
	f := &forward{listener: listener, dial: dial}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.running.Go(func() {
		Accept(f.ctx, listener, func(conn net.Conn) {
			f.running.Go(func() { f.serve(conn) })
		})
	})
	return f
}

// forward is one listener that is forwarded.
type forward struct {
	listener net.Listener
	dial     func(context.Context) (net.Conn, error)
	ctx      context.Context // ends with the forward
	cancel   context.CancelFunc
	running  sync.WaitGroup // the listener, and its connections
}

// Close implements [io.Closer].
func (f *forward) Close() error {
	f.cancel()
	err := f.listener.Close()
	f.running.Wait()
	return err
}

func (f *forward) serve(conn net.Conn) {
	to, err := f.dial(f.ctx)
	if err != nil {
		_ = conn.Close()
		return
	}
	Splice(f.ctx, conn, to)
}
