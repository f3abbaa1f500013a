package intercept

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"
)

const (
	apiHost   = "api.example"
	theValue  = "the-secret-value"
	theHolder = "smolvm_secret_00112233445566778899aabbccddeeff"
)

// world is a server, the interceptor before it, and what a guest connects to.
type world struct {
	t           *testing.T
	target      Target
	server      *httptest.Server
	interceptor *Interceptor
	way         net.Listener // where the guest's connections come out
	log         lockedBuffer

	mu    sync.Mutex // guards the following
	at    string     // where it dials
	sent  []string
	dials int
}

// lockedBuffer is a buffer that may be written to and read at the same time.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// outside is an authority that the host trusts, and a certificate of it for names.
func outside(t *testing.T, names ...string) (*x509.CertPool, tls.Certificate) {
	t.Helper()
	made, err := newAuthority(names, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := made.leaf(names[0])
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(made.certificate)
	return pool, *leaf
}

// options of a world; the zero value is one of HTTP/1.1 whose server is in order.
type options struct {
	http2     bool
	untrusted bool   // the host does not trust the server's authority
	named     string // what the server's certificate is for; empty: apiHost
	server    func(*http.Server)
	value     string
}

func newWorld(t *testing.T, handler http.HandlerFunc, opts options) *world {
	t.Helper()
	name := opts.named
	if name == "" {
		name = apiHost
	}
	pool, certificate := outside(t, name)
	if opts.untrusted {
		pool = x509.NewCertPool()
	}
	w := &world{t: t, target: Target{apiHost, 443}}
	w.server = httptest.NewUnstartedServer(handler)
	w.server.EnableHTTP2 = opts.http2
	w.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	w.server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	if opts.server != nil {
		opts.server(w.server.Config)
	}
	w.server.StartTLS()
	t.Cleanup(w.server.Close)
	w.at = w.server.Listener.Addr().String()
	value := opts.value
	if value == "" {
		value = theValue
	}
	var err error
	w.interceptor, err = New(Options{
		Secrets: []Secret{{Name: "TOKEN", Placeholder: theHolder, Value: value, Targets: []Target{w.target}}},
		Roots:   pool, Log: slog.New(slog.NewTextHandler(&w.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.listen()
	return w
}

// listen carries each connection of the guest, until the test ends.
func (w *world) listen() {
	var err error
	if w.way, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var carried sync.WaitGroup
	carried.Go(func() {
		for {
			conn, err := w.way.Accept()
			if err != nil {
				return
			}
			carried.Go(func() {
				_ = w.interceptor.Carry(ctx, conn, Flow{To: w.target, Dial: w.dial, Sent: w.note})
			})
		}
	})
	w.t.Cleanup(func() {
		_ = w.way.Close()
		cancel()
		carried.Wait()
	})
}

func (w *world) dial(ctx context.Context) (net.Conn, error) {
	w.mu.Lock()
	w.dials++
	at := w.at
	w.mu.Unlock()
	return new(net.Dialer).DialContext(ctx, "tcp", at)
}

func (w *world) note(names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, names...)
}

func (w *world) told() (sent []string, dials int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.sent...), w.dials
}

// guestTLS is the guest's configuration, which trusts the VM's authority, and nobody else.
func (w *world) guestTLS() *tls.Config {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(w.interceptor.Certificate()) {
		w.t.Fatal("the authority's certificate is none")
	}
	return &tls.Config{RootCAs: pool, ServerName: apiHost}
}

// client is the guest's.
func (w *world) client(http2 bool) *http.Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", w.way.Addr().String())
		},
		TLSClientConfig: w.guestTLS(), ForceAttemptHTTP2: http2, ExpectContinueTimeout: time.Minute,
	}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
}

// answer is an answer to the guest, without its body.
type answer struct {
	code   int
	proto  string
	header http.Header
	leaf   *x509.Certificate
}

// do sends a request, and returns the answer and its body.
func (w *world) do(client *http.Client, request *http.Request) (answer, string) {
	w.t.Helper()
	got, err := client.Do(request)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = got.Body.Close() }()
	body, err := io.ReadAll(got.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer{got.StatusCode, got.Proto, got.Header, got.TLS.PeerCertificates[0]}, string(body)
}

func newRequest(t *testing.T, method, path string, body io.Reader) *http.Request {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, "https://"+apiHost+path, body)
	if err != nil {
		t.Fatal(err)
	}
	return request
}
