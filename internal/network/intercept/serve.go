package intercept

import (
	"context"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"sync"
	"time"
)

const (
	// maxHeader is how long the headers of a request may be, in bytes, with and without
	// secrets; maxAnswerHeader those of an answer.
	maxHeader, maxAnswerHeader = 64 << 10, 256 << 10
	// headerTime is how long the headers of a request may take, once they have begun.
	headerTime = 30 * time.Second
	// idleTime is how long the guest may have a connection open without a request.
	idleTime = 5 * time.Minute
	// continueTime is how long a server may take to ask for a body that the guest has offered
	// it (Expect: 100-continue), before it gets it.
	continueTime = time.Second
	// maxStreams is how many requests of HTTP/2 a connection may have at once. What each, and
	// all of them, may have waiting for the other side is bounded, in bytes.
	maxStreams               = 100
	maxStreamBuffer, maxConn = 512 << 10, 1 << 20
)

// serve passes requests on until the guest's connection has ended, and returns when nothing
// of them runs any more.
func (f *flow) serve(ctx context.Context, conn *tls.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	transport := f.transport()
	defer transport.CloseIdleConnections()
	replace := newReplacer(f.secrets)
	handler := &handler{flow: f, replace: replace, proxy: f.proxy(transport, replace)}
	ended := make(chan struct{})
	end := sync.OnceFunc(func() { close(ended) })
	server := &http.Server{
		Handler: handler, ErrorLog: log.New(io.Discard, "", 0),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: headerTime, IdleTimeout: idleTime, MaxHeaderBytes: maxHeader,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: maxStreams, MaxReceiveBufferPerStream: maxStreamBuffer, MaxReceiveBufferPerConnection: maxConn,
		},
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateClosed || state == http.StateHijacked {
				end()
			}
		},
	}
	_ = server.Serve(&oneConn{conn: conn, closed: f.guest.closed})
	cancel()
	f.closeUpstream()
	_ = server.Close()
	<-ended
	handler.wait()
}

// oneConn is a listener to which one connection comes.
type oneConn struct {
	conn   net.Conn
	taken  bool
	closed <-chan struct{} // when the connection has ended
}

// Accept implements [net.Listener].
func (l *oneConn) Accept() (net.Conn, error) {
	if !l.taken {
		l.taken = true
		return l.conn, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

// Close implements [net.Listener].
func (l *oneConn) Close() error { return nil }

// Addr implements [net.Listener].
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

func (f *flow) transport() *http.Transport {
	return &http.Transport{
		DialTLSContext:    f.dialTLS,
		ForceAttemptHTTP2: true, // it is what guest and server have agreed on that counts
		// What is compressed stays so, and what is not stays so too.
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxAnswerHeader,
		ExpectContinueTimeout:  continueTime,
		HTTP2:                  &http.HTTP2Config{MaxReceiveBufferPerStream: maxStreamBuffer, MaxReceiveBufferPerConnection: maxConn},
	}
}

func (f *flow) proxy(transport http.RoundTripper, replace *replacer) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Transport: transport, BufferPool: &f.of.buffers, ErrorLog: log.New(io.Discard, "", 0),
		FlushInterval: -1, // at once, as the server sends it
		Rewrite:       f.rewrite,
		ModifyResponse: func(answer *http.Response) error {
			// What leads past this connection would not have the secret in it.
			answer.Header.Del("Alt-Svc")
			replace.hide(answer.Header)
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, "smolvm: "+f.To.String()+": "+err.Error(), http.StatusBadGateway)
		},
	}
}

// rewrite makes a request one to the server, and leaves it as it is else.
func (f *flow) rewrite(r *httputil.ProxyRequest) {
	r.Out.URL.Scheme, r.Out.URL.Host = "https", f.To.String()
	r.Out.URL.RawQuery = r.In.URL.RawQuery
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if values, ok := r.In.Header[name]; ok {
			r.Out.Header[name] = values // the guest's own, not a proxy's
		}
	}
	r.Out.Trailer = r.In.Trailer // which is filled in when the body has been read
}

// handler answers the requests of a flow.
type handler struct {
	flow    *flow
	replace *replacer
	proxy   http.Handler

	mu      sync.Mutex // guards the following
	closed  bool
	running sync.WaitGroup
}

// begin counts a request, unless there are to be no more.
func (h *handler) begin() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.running.Add(1)
	}
	return !h.closed
}

// wait returns when no request is answered any more.
func (h *handler) wait() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.running.Wait()
}

// ServeHTTP implements [http.Handler].
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !h.begin() {
		panic(http.ErrAbortHandler)
	}
	defer h.running.Done()
	if !h.flow.isHost(r.Host) {
		// The server may be that of others too, by this name.
		http.Error(w, "smolvm: this connection is to "+h.flow.To.Host, http.StatusMisdirectedRequest)
		return
	}
	if r.Method == http.MethodConnect || r.Method == http.MethodTrace {
		// A tunnel leads elsewhere, and a trace brings the headers back in its body.
		http.Error(w, "smolvm: no "+r.Method+" to a host that has a secret", http.StatusMethodNotAllowed)
		return
	}
	names, ok := h.replace.fill(r.Header)
	if !ok {
		http.Error(w, "smolvm: the headers are too long with the secrets in them", http.StatusRequestHeaderFieldsTooLarge)
		return
	}
	if len(names) > 0 && h.flow.Sent != nil {
		h.flow.Sent(names)
	}
	if r.ProtoMajor == 1 {
		// The server may answer while it is sent to.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	h.proxy.ServeHTTP(w, r)
}

// isHost reports whether the host that a request names is the one that the connection is to.
func (f *flow) isHost(host string) bool {
	if name, port, err := net.SplitHostPort(host); err == nil {
		if port != strconv.Itoa(int(f.To.Port)) {
			return false
		}
		host = name
	}
	return normal(host) == f.To.Host
}

// bufferPool keeps the buffers by which bodies are copied.
type bufferPool struct{ pool sync.Pool }

const copyBuffer = 32 << 10

// Get implements [httputil.BufferPool].
func (b *bufferPool) Get() []byte {
	if buffer, ok := b.pool.Get().(*[]byte); ok {
		return *buffer
	}
	return make([]byte, copyBuffer)
}

// Put implements [httputil.BufferPool].
func (b *bufferPool) Put(buffer []byte) { b.pool.Put(&buffer) }
