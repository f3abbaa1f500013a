package usernet

import (
	"context"
	"net"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/smolvm/smolvm/internal/network"
)

// guestConn is a TCP connection with the guest. It has its place in the [account] until the
// stack holds nothing of it any more.
type guestConn struct {
	*gonet.TCPConn
	endpoint tcpip.Endpoint
	once     sync.Once
	closed   chan struct{}
}

// conn makes a connection of an endpoint.
func (r *reservation) conn(endpoint tcpip.Endpoint, queue *waiter.Queue) *guestConn {
	options := endpoint.SocketOptions()
	options.SetReceiveBufferSize(int64(r.buffer), true)
	options.SetSendBufferSize(int64(r.buffer), true)
	c := &guestConn{TCPConn: gonet.NewTCPConn(queue, endpoint), endpoint: endpoint, closed: make(chan struct{})}
	ended, hangUp := waiter.NewChannelEntry(waiter.EventHUp)
	queue.EventRegister(&ended)
	go func() {
		defer r.release()
		c.await(hangUp, r.of.account)
		queue.EventUnregister(&ended)
	}()
	return c
}

// Close implements [net.Conn]. What is left to be sent is sent still, for a while.
func (c *guestConn) Close() error {
	c.once.Do(func() {
		_ = c.TCPConn.Close()
		close(c.closed)
	})
	return nil
}

// Abort closes the connection at once, and has the guest told that it was broken off.
func (c *guestConn) Abort() {
	c.endpoint.Abort()
	_ = c.Close()
}

// await returns when the connection is closed here and over in the stack. If that takes the
// guest too long, it ends the connection.
func (c *guestConn) await(hangUp <-chan struct{}, of *account) {
	closed := c.closed
	var expired <-chan time.Time
	for closed != nil || !c.isOver() {
		select {
		case <-closed:
			closed = nil
			timer := time.NewTimer(of.linger)
			defer timer.Stop()
			expired = timer.C
		case <-hangUp:
		case <-expired:
			c.endpoint.Abort()
			return
		case <-of.done:
			c.Abort()
			return
		}
	}
}

func (c *guestConn) isOver() bool {
	state := tcp.EndpointState(c.endpoint.State())
	return state == tcp.StateClose || state == tcp.StateError
}

// dialGuest connects to an address of the guest.
func (k *kind) dialGuest(ctx context.Context, s *stack.Stack, to tcpip.FullAddress) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	place, err := k.reserve()
	if err != nil {
		return nil, err
	}
	var queue waiter.Queue
	endpoint, failed := s.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &queue)
	if failed != nil {
		place.release()
		return nil, stackError(failed)
	}
	conn := place.conn(endpoint, &queue)
	connected, notified := waiter.NewChannelEntry(waiter.WritableEvents)
	queue.EventRegister(&connected)
	defer queue.EventUnregister(&connected)
	failed = endpoint.Connect(to)
	if _, begun := failed.(*tcpip.ErrConnectStarted); begun {
		select {
		case <-notified:
			failed = endpoint.LastError()
		case <-ctx.Done():
			conn.Abort()
			return nil, context.Cause(ctx)
		}
	}
	if failed != nil {
		_ = conn.Close()
		if _, refused := failed.(*tcpip.ErrConnectionRefused); refused {
			return nil, network.ErrRefused
		}
		return nil, stackError(failed)
	}
	return conn, nil
}

// guestListener accepts connections of the guest to a service of the network.
type guestListener struct {
	of       *kind
	endpoint tcpip.Endpoint
	queue    *waiter.Queue
	address  net.Addr
	once     sync.Once
	closed   chan struct{}
}

// listen opens a port for the guest. What the guest may have waiting to be accepted is no
// more than what it may have accepted.
func (k *kind) listen(s *stack.Stack, at tcpip.FullAddress) (*guestListener, error) {
	l := &guestListener{
		of: k, queue: new(waiter.Queue), closed: make(chan struct{}),
		address: &net.TCPAddr{IP: at.Addr.AsSlice(), Port: int(at.Port)},
	}
	var failed tcpip.Error
	if l.endpoint, failed = s.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, l.queue); failed != nil {
		return nil, stackError(failed)
	}
	l.endpoint.SocketOptions().SetReceiveBufferSize(minBuffer, true) // of those that wait
	if failed = l.endpoint.Bind(at); failed == nil {
		failed = l.endpoint.Listen(k.limit)
	}
	if failed != nil {
		l.endpoint.Close()
		return nil, stackError(failed)
	}
	return l, nil
}

// Accept implements [net.Listener]. A guest that has too many connections already has the
// next one broken off.
func (l *guestListener) Accept() (net.Conn, error) {
	waiting, notified := waiter.NewChannelEntry(waiter.ReadableEvents)
	l.queue.EventRegister(&waiting)
	defer l.queue.EventUnregister(&waiting)
	for {
		endpoint, queue, failed := l.endpoint.Accept(nil)
		switch failed.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			select {
			case <-notified:
				continue
			case <-l.closed:
				return nil, net.ErrClosed
			}
		default:
			return nil, net.ErrClosed // it is not heard from any more, for whatever reason
		}
		place, err := l.of.reserve()
		if err != nil {
			endpoint.Abort()
			continue
		}
		return place.conn(endpoint, queue), nil
	}
}

// Addr implements [net.Listener].
func (l *guestListener) Addr() net.Addr { return l.address }

// Close implements [net.Listener].
func (l *guestListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.endpoint.Close()
	})
	return nil
}
