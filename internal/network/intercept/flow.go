package intercept

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
)

// The protocols that secrets are put into, as TLS names them.
const (
	protocolHTTP1 = "http/1.1"
	protocolHTTP2 = "h2"
)

// maxUpstream is how many connections to the server a flow may have at once: one for the
// requests, another when the server is about to close the first one or takes no more requests
// by it.
const maxUpstream = 4

// flow is one connection of the guest that is intercepted.
type flow struct {
	Flow
	of       *Interceptor
	secrets  []Secret
	guest    *guestSide
	protocol string // that guest and server speak; empty: they have not agreed on one
	passes   error  // why the flow is carried as it is; nil: it is not

	mu       sync.Mutex // guards the following
	first    *tls.Conn  // to the server, until it is used
	upstream map[*upstreamConn]struct{}
	closed   bool
}

var (
	errNoHTTP   = errors.New("the guest offers no version of HTTP that can be intercepted")
	errUpstream = errors.New("too many connections to the server")
)

// handshake agrees with guest and server on a protocol: the server is asked for what the guest
// offers, verified, and answered for. The guest hears nothing before.
func (f *flow) handshake(ctx context.Context) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, handshakeTime, errors.New("the TLS handshake takes too long"))
	defer cancel()
	conn := tls.Server(f.guest, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return f.answer(ctx, hello)
		},
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return conn, nil
}

// answer returns how a guest's hello is answered. On failure f.passes is not nil if the flow is to
// be carried as it is.
func (f *flow) answer(ctx context.Context, hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if normal(hello.ServerName) != f.To.Host {
		return nil, fmt.Errorf("it states the name %q now", hello.ServerName)
	}
	leaf, err := f.of.authority.leaf(f.To.Host)
	if err != nil {
		return nil, err
	}
	offered := slices.DeleteFunc(slices.Clone(hello.SupportedProtos), func(p string) bool {
		return p != protocolHTTP1 && p != protocolHTTP2
	})
	if len(offered) == 0 && len(hello.SupportedProtos) > 0 {
		f.passes = errNoHTTP
		return nil, errNoHTTP
	}
	first, err := f.connect(ctx, offered)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.first = first
	f.mu.Unlock()
	f.protocol = first.ConnectionState().NegotiatedProtocol
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*leaf}, SessionTicketsDisabled: true}
	if f.protocol != "" {
		config.NextProtos = []string{f.protocol}
	}
	f.guest.decide()
	return config, nil
}

// connect opens a connection to the server, and verifies it. If it is no server that can be
// trusted, that is in f.passes.
func (f *flow) connect(ctx context.Context, protocols []string) (*tls.Conn, error) {
	raw, err := f.Dial(ctx)
	if err != nil {
		return nil, err
	}
	counted := &upstreamConn{Conn: raw, of: f}
	if !f.add(counted) {
		_ = raw.Close()
		return nil, errUpstream
	}
	conn := tls.Client(counted, &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: f.To.Host, RootCAs: f.of.roots, NextProtos: protocols,
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = counted.Close()
		if ctx.Err() == nil {
			f.passes = fmt.Errorf("TLS with the server: %w", err)
		}
		return nil, err
	}
	return conn, nil
}

// dialTLS returns a connection to the server for requests: the one of the handshake, or
// another one like it.
func (f *flow) dialTLS(ctx context.Context, _, _ string) (net.Conn, error) {
	f.mu.Lock()
	first := f.first
	f.first = nil
	f.mu.Unlock()
	if first != nil {
		return first, nil
	}
	var protocols []string
	if f.protocol != "" {
		protocols = []string{f.protocol}
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	return f.connect(ctx, protocols)
}

// upstreamConn is a connection to the server, which ends with the flow.
type upstreamConn struct {
	net.Conn
	of   *flow
	once sync.Once
}

func (c *upstreamConn) Close() error {
	c.once.Do(func() {
		c.of.mu.Lock()
		delete(c.of.upstream, c)
		c.of.mu.Unlock()
		_ = c.Conn.Close()
	})
	return nil
}

func (f *flow) add(conn *upstreamConn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || len(f.upstream) >= maxUpstream {
		return false
	}
	if f.upstream == nil {
		f.upstream = map[*upstreamConn]struct{}{}
	}
	f.upstream[conn] = struct{}{}
	return true
}

// closeUpstream closes all connections to the server.
func (f *flow) closeUpstream() {
	f.mu.Lock()
	f.closed = true
	var all []*upstreamConn
	for conn := range f.upstream {
		all = append(all, conn)
	}
	f.mu.Unlock()
	for _, conn := range all {
		_ = conn.Close()
	}
}

// guestSide is the connection of the guest. Until it is decided who answers the guest, nothing
// is sent to it, and what was read can be read again.
type guestSide struct {
	net.Conn
	closed chan struct{}
	once   sync.Once

	mu      sync.Mutex // guards the following
	decided bool
	read    []byte // before it was decided; as much as a ClientHello may have
}

func newGuestSide(conn net.Conn) *guestSide {
	return &guestSide{Conn: conn, closed: make(chan struct{})}
}

var errUndecided = errors.New("nobody answers the guest yet")

func (g *guestSide) decide() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.decided, g.read = true, nil
}

// Read implements [net.Conn].
func (g *guestSide) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.decided {
		g.read = append(g.read, p[:n]...)
	}
	return n, err
}

// Write implements [net.Conn].
func (g *guestSide) Write(p []byte) (int, error) {
	g.mu.Lock()
	decided := g.decided
	g.mu.Unlock()
	if !decided {
		return 0, errUndecided
	}
	return g.Conn.Write(p)
}

// Close implements [net.Conn].
func (g *guestSide) Close() error {
	g.once.Do(func() {
		_ = g.Conn.Close()
		close(g.closed)
	})
	return nil
}

// again returns the connection with what was read before all else.
func (g *guestSide) again() net.Conn {
	g.mu.Lock()
	defer g.mu.Unlock()
	return &replayed{Conn: g.Conn, read: g.read}
}

// replayed is a connection of which some has been read already.
type replayed struct {
	net.Conn
	read []byte
}

// Read implements [net.Conn].
func (r *replayed) Read(p []byte) (int, error) {
	if len(r.read) == 0 {
		return r.Conn.Read(p)
	}
	n := copy(p, r.read)
	r.read = r.read[n:]
	return n, nil
}

// CloseWrite closes the connection for writing, if it can be, and else as a whole.
func (r *replayed) CloseWrite() error {
	if half, ok := r.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return r.Close()
}

// Abort breaks the connection off.
func (r *replayed) Abort() { abort(r.Conn) }

// abort breaks a connection off, if it can be, so that the guest does not take what it got for
// all there was.
func abort(conn net.Conn) {
	if breakable, ok := conn.(interface{ Abort() }); ok {
		breakable.Abort()
		return
	}
	_ = conn.Close()
}
