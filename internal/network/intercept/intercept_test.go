package intercept

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo answers with the headers of the request, as lines.
func echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Proto", r.Proto)
	_ = r.Header.Write(w)
}

// Each placeholder in a header is replaced, and nothing else of a request is changed, by both
// versions of HTTP.
func TestRequest(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("http2=%t", http2), func(t *testing.T) {
			t.Parallel()
			var path, body, host string
			w := newWorld(t, func(w http.ResponseWriter, r *http.Request) {
				text, _ := io.ReadAll(r.Body)
				path, body, host = r.RequestURI, string(text), r.Host
				w.Header().Set("X-Echo", r.Header.Get("Authorization"))
				w.Header().Set("Alt-Svc", `h3=":443"`)
				echo(w, r)
			}, options{http2: http2})
			client := w.client(http2)
			const asked = "/a%2Fb/c?q=" + theHolder + "&odd;=1&%zz"
			request := newRequest(t, http.MethodPost, "/", strings.NewReader("body "+theHolder))
			request.URL.Opaque = "//" + apiHost + asked
			request.Header.Set("Authorization", "Bearer "+theHolder)
			request.Header.Set("X-Forwarded-For", "192.0.2.1")
			request.Header.Add("X-Two", theHolder+","+theHolder)
			request.Header.Add("X-Two", "plain")
			answer, got := w.do(client, request)
			wantProto := "HTTP/1.1"
			if http2 {
				wantProto = "HTTP/2.0"
			}
			if answer.code != http.StatusOK || answer.proto != wantProto || answer.header.Get("X-Proto") != wantProto {
				t.Fatalf("%d by %s, %s at the server: %s", answer.code, answer.proto, answer.header.Get("X-Proto"), got)
			}
			for _, line := range []string{
				"Authorization: Bearer " + theValue, "X-Two: " + theValue + "," + theValue, "X-Two: plain", "X-Forwarded-For: 192.0.2.1",
			} {
				if !strings.Contains(got, line+"\r\n") {
					t.Errorf("the server got no %q but %s", line, got)
				}
			}
			if strings.Contains(got, theHolder) {
				t.Errorf("the server got a placeholder: %s", got)
			}
			if path != asked || body != "body "+theHolder || host != apiHost {
				t.Errorf("the server got %s, %q for %s", path, body, host)
			}
			if back := answer.header.Get("X-Echo"); back != "Bearer "+theHolder {
				t.Errorf("the guest gets %q back", back)
			}
			if answer.header.Get("Alt-Svc") != "" {
				t.Error("the guest is told of HTTP/3")
			}
			for range 2 { // on the connection that there is
				w.do(client, newRequest(t, http.MethodGet, "/", nil))
			}
			if sent, dials := w.told(); !slices.Equal(sent, []string{"TOKEN"}) || dials != 1 {
				t.Errorf("told of %q, and dialed %d times", sent, dials)
			}
		})
	}
}

func TestBasic(t *testing.T) {
	t.Parallel()
	w := newWorld(t, echo, options{})
	for _, test := range []struct{ sent, want string }{
		{basic("x-access-token:" + theHolder), basic("x-access-token:" + theValue)},
		{strings.Replace(basic(theHolder+":"), "Basic", "bAsIc", 1), strings.Replace(basic(theValue+":"), "Basic", "bAsIc", 1)},
		{basic("user:" + theHolder[1:]), basic("user:" + theHolder[1:])},
		{"Basic " + theHolder, "Basic " + theValue},
		{"Basic !", "Basic !"},
		{"token " + theHolder, "token " + theValue},
	} {
		request := newRequest(t, http.MethodGet, "/", nil)
		request.Header.Set("Authorization", test.sent)
		if _, got := w.do(w.client(false), request); !strings.Contains(got, "Authorization: "+test.want+"\r\n") {
			t.Errorf("%s: %s, want %s", test.sent, got, test.want)
		}
	}
}

func basic(text string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(text)) }

// A request that names another host, as clients may by a server that many share, gets no
// secret, and does not get there.
func TestOtherHost(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{false, true} {
		w := newWorld(t, func(http.ResponseWriter, *http.Request) { t.Error("it got there") }, options{http2: http2})
		for _, host := range []string{"other.example", "api.example:8443", "api.example.other", "x.api.example", "[::1]:443"} {
			request := newRequest(t, http.MethodGet, "/", nil)
			request.Host = host
			request.Header.Set("Authorization", theHolder)
			if answer, _ := w.do(w.client(http2), request); answer.code != http.StatusMisdirectedRequest {
				t.Errorf("host %s: %d", host, answer.code)
			}
		}
		if answer, _ := w.do(w.client(http2), newRequest(t, http.MethodTrace, "/", nil)); answer.code != http.StatusMethodNotAllowed {
			t.Errorf("TRACE: %d", answer.code)
		}
		request := newRequest(t, http.MethodConnect, "", nil)
		if answer, err := w.client(false).Transport.RoundTrip(request); err == nil {
			_ = answer.Body.Close()
			if answer.StatusCode != http.StatusMethodNotAllowed {
				t.Errorf("CONNECT: %s", answer.Status)
			}
		}
	}
	w := newWorld(t, echo, options{})
	for _, host := range []string{"API.example", "api.example:443", "api.example."} {
		request := newRequest(t, http.MethodGet, "/", nil)
		request.Host = host
		if answer, _ := w.do(w.client(false), request); answer.code != http.StatusOK {
			t.Errorf("host %s: %d", host, answer.code)
		}
	}
}

// A server that can't be verified as the secret's host gets what the guest sends, and the guest
// gets its certificate, as if nobody was between them. It gets no secret.
func TestServerNotVerified(t *testing.T) {
	t.Parallel()
	for what, opts := range map[string]options{"untrusted": {untrusted: true}, "another name": {named: "other.example"}} {
		w := newWorld(t, echo, opts)
		client := w.client(false)
		if answer, err := client.Do(newRequest(t, http.MethodGet, "/", nil)); err == nil {
			_ = answer.Body.Close()
			t.Errorf("%s: the guest trusts the server", what)
		}
		transport, ok := client.Transport.(*http.Transport)
		if !ok {
			t.Fatal("no transport")
		}
		careless := transport.Clone()
		careless.TLSClientConfig.InsecureSkipVerify = true
		defer careless.CloseIdleConnections()
		request := newRequest(t, http.MethodGet, "/", nil)
		request.Header.Set("Authorization", theHolder)
		answer, got := w.do(&http.Client{Transport: careless}, request)
		if !strings.Contains(got, "Authorization: "+theHolder) {
			t.Errorf("%s: the server got %s", what, got)
		}
		if !answer.leaf.Equal(leafOf(t, w)) {
			t.Errorf("%s: the guest gets another certificate than the server's", what)
		}
		if text := w.log.String(); strings.Count(text, "no secret is put") != 1 || strings.Contains(text, theValue) {
			t.Errorf("%s: the log says %q", what, text)
		}
	}
}

func leafOf(t *testing.T, w *world) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(w.server.TLS.Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// What is not HTTP is carried as it is.
func TestOtherProtocol(t *testing.T) {
	t.Parallel()
	_, certificate := outside(t, apiHost)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"imap"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			_, _ = io.Copy(conn, conn)
			_ = conn.Close()
		}
	}()
	w := newWorld(t, echo, options{})
	w.mu.Lock()
	w.at = listener.Addr().String()
	w.mu.Unlock()
	conn, err := tls.Dial("tcp", w.way.Addr().String(), &tls.Config{InsecureSkipVerify: true, ServerName: apiHost, NextProtos: []string{"imap"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, theHolder); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); string(got) != theHolder || err != nil {
		t.Errorf("echoed: %q, %v", got, err)
	}
	_ = conn.Close()
}

// Bodies pass in both directions as they come, both at once, by HTTP/2.
func TestStreaming(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w http.ResponseWriter, r *http.Request) {
		controller := http.NewResponseController(w)
		_ = controller.EnableFullDuplex()
		w.Header().Set("Trailer", "X-Sum")
		_ = controller.Flush()
		lines := bufio.NewScanner(r.Body)
		for lines.Scan() {
			_, _ = fmt.Fprintf(w, "got %s\n", lines.Text())
			_ = controller.Flush()
		}
		w.Header().Set("X-Sum", r.Trailer.Get("X-Mine"))
	}, options{http2: true})
	for _, http2 := range []bool{false, true} {
		// HTTP/1.1 of the guest is HTTP/1.1 at the server, which has both.
		body, send := io.Pipe()
		request := newRequest(t, http.MethodPost, "/", body)
		request.Trailer = http.Header{"X-Mine": nil}
		answer, err := w.client(http2).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(answer.Body)
		for n := range 3 {
			if _, err := fmt.Fprintf(send, "%d\n", n); err != nil {
				t.Fatal(err)
			}
			if got, err := lines.ReadString('\n'); got != fmt.Sprintf("got %d\n", n) || err != nil {
				t.Fatalf("http2=%t: %q, %v", http2, got, err)
			}
		}
		request.Trailer.Set("X-Mine", "7")
		_ = send.Close()
		if rest, err := io.ReadAll(lines); len(rest) > 0 || err != nil || answer.Trailer.Get("X-Sum") != "7" {
			t.Errorf("http2=%t: it ends with %q, %v and trailer %q", http2, rest, err, answer.Trailer)
		}
		_ = answer.Body.Close()
	}
}

// A large body passes whole, and one that breaks off is no whole one for the guest.
func TestBodies(t *testing.T) {
	t.Parallel()
	large := bytes.Repeat([]byte("0123456789abcdef"), 256<<10) // 4 MiB
	w := newWorld(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/broken" {
			_, _ = w.Write(large)
			panic(http.ErrAbortHandler)
		}
		_, _ = io.Copy(w, r.Body)
	}, options{http2: true})
	for _, http2 := range []bool{false, true} {
		client := w.client(http2)
		if _, got := w.do(client, newRequest(t, http.MethodPost, "/", bytes.NewReader(large))); got != string(large) {
			t.Errorf("http2=%t: %d bytes of %d", http2, len(got), len(large))
		}
		answer, err := client.Do(newRequest(t, http.MethodGet, "/broken", nil))
		if err == nil {
			_, err = io.Copy(io.Discard, answer.Body)
			_ = answer.Body.Close()
		}
		if err == nil {
			t.Errorf("http2=%t: what broke off is whole", http2)
		}
	}
}

// A server that wants no body is not sent one, and one that does is.
func TestExpectContinue(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refuse" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = io.Copy(w, r.Body)
	}, options{})
	for path, want := range map[string]int{"/refuse": http.StatusForbidden, "/take": http.StatusOK} {
		request := newRequest(t, http.MethodPut, path, strings.NewReader("body"))
		request.Header.Set("Expect", "100-continue")
		asked := false
		request = request.WithContext(httptrace.WithClientTrace(request.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
				asked = asked || code == http.StatusContinue
				return nil
			},
		}))
		answer, got := w.do(w.client(false), request)
		if answer.code != want || want == http.StatusOK && got != "body" || asked != (want == http.StatusOK) {
			t.Errorf("%s: %d, %q, asked to go on: %t", path, answer.code, got, asked)
		}
	}
}

// A WebSocket, as any protocol that HTTP/1.1 is upgraded to, passes both ways, with the secret
// in the request that begins it and in nothing after it.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != theValue {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello\n")
		_, _ = io.Copy(conn, buffered)
	}, options{http2: true})
	conn, err := tls.Dial("tcp", w.way.Addr().String(), w.guestTLS())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, err = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: api.example\r\nAuthorization: "+theHolder+
		"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(conn)
	answer, err := http.ReadResponse(reader, nil)
	if err != nil || answer.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%+v, %v", answer, err)
	}
	defer func() { _ = answer.Body.Close() }()
	for _, line := range []string{"hello\n", theHolder + "\n", "\x00\xff binary\n"} {
		if line != "hello\n" {
			if _, err := io.WriteString(conn, line); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := reader.ReadString('\n'); got != line || err != nil {
			t.Errorf("%q, %v, want %q", got, err, line)
		}
	}
}

// Headers are bounded, with and without secrets in them, and a request that is none is refused.
func TestHostileRequests(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(http.ResponseWriter, *http.Request) { t.Error("it got there") }, options{value: strings.Repeat("v", 8<<10)})
	for what, text := range map[string]string{
		"long":            "GET / HTTP/1.1\r\nHost: api.example\r\nX: " + strings.Repeat("x", maxHeader+8<<10) + "\r\n\r\n",
		"many":            "GET / HTTP/1.1\r\nHost: api.example\r\n" + strings.Repeat("X: x\r\n", maxHeader) + "\r\n",
		"grows":           "GET / HTTP/1.1\r\nHost: api.example\r\nX: " + strings.Repeat(theHolder, 100) + "\r\n\r\n",
		"no HTTP":         "hello\r\n\r\n",
		"two lengths":     "POST / HTTP/1.1\r\nHost: api.example\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
		"two hosts":       "GET / HTTP/1.1\r\nHost: api.example\r\nHost: other.example\r\n\r\n",
		"no host":         "GET / HTTP/1.1\r\n\r\n",
		"other encoding":  "POST / HTTP/1.1\r\nHost: api.example\r\nTransfer-Encoding: gzip\r\n\r\n",
		"HTTP/2 unasked":  "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"absolute target": "GET https://other.example/ HTTP/1.1\r\nHost: api.example\r\n\r\n",
	} {
		conn, err := tls.Dial("tcp", w.way.Addr().String(), w.guestTLS())
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.WriteString(conn, text) }() // the answer may come before all is sent
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if answer.StatusCode < http.StatusBadRequest {
			t.Errorf("%s: %s", what, answer.Status)
		}
		_, _ = answer.Body.Close(), conn.Close()
	}
	if sent, _ := w.told(); len(sent) > 0 {
		t.Errorf("told of %q", sent)
	}
}

// The guest is served what its hello asks for, by another name not at all, and no more
// connections than there may be.
func TestHostileHandshakes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, echo, options{})
	config := w.guestTLS()
	config.ServerName, config.InsecureSkipVerify = "other.example", true
	if conn, err := tls.Dial("tcp", w.way.Addr().String(), config); err == nil {
		_ = conn.Close()
		t.Error("the guest gets a certificate for another name")
	}
	conn, err := net.Dial("tcp", w.way.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(conn, "no TLS at all")
	if got, _ := io.ReadAll(conn); len(got) > 0 {
		t.Errorf("it gets %q", got)
	}
	_ = conn.Close()
	for range MaxFlows { // which say nothing, and hold a place each
		w.interceptor.places <- struct{}{}
	}
	ours, theirs := net.Pipe()
	err = w.interceptor.Carry(t.Context(), theirs, Flow{To: w.target, Dial: w.dial})
	if !errors.Is(err, errFull) {
		t.Errorf("one too many: %v", err)
	}
	_ = ours.Close()
	for range MaxFlows {
		<-w.interceptor.places
	}
}

// A flow ends with its context at once, whatever is under way, and so do both of its sides.
func TestEndsWithContext(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{false, true} {
		arrived, left := make(chan struct{}), make(chan struct{})
		w := newWorld(t, func(w http.ResponseWriter, r *http.Request) {
			_ = http.NewResponseController(w).Flush()
			close(arrived)
			<-r.Context().Done()
			close(left)
		}, options{http2: http2})
		ctx, cancel := context.WithCancel(t.Context())
		carried := make(chan struct{})
		client := w.client(http2)
		transport, ok := client.Transport.(*http.Transport)
		if !ok {
			t.Fatal("no transport")
		}
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			go func() {
				_ = w.interceptor.Carry(ctx, theirs, Flow{To: w.target, Dial: w.dial})
				close(carried)
			}()
			return ours, nil
		}
		answer, err := client.Do(newRequest(t, http.MethodGet, "/", nil))
		if err != nil {
			t.Fatal(err)
		}
		<-arrived
		cancel()
		<-carried
		<-left
		if _, err := io.ReadAll(answer.Body); err == nil {
			t.Error("the guest takes what came for all there was")
		}
		_ = answer.Body.Close()
	}
}

// A server that goes away between two requests is connected to again.
func TestServerCloses(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		echo(w, r)
	}, options{})
	client := w.client(false)
	for range 3 {
		request := newRequest(t, http.MethodGet, "/", nil)
		request.Header.Set("Authorization", theHolder)
		if _, got := w.do(client, request); !strings.Contains(got, theValue) {
			t.Errorf("the server got %s", got)
		}
	}
}

// No two VMs have an authority in common, and one certifies nothing but the hosts of its
// secrets, anew before a certificate is too old.
func TestAuthority(t *testing.T) {
	t.Parallel()
	now := time.Now()
	made, err := newAuthority([]string{apiHost}, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	other, err := newAuthority([]string{apiHost}, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	first, err := made.leaf(apiHost)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(leaf *x509.Certificate, by *authority, name string, at time.Time) error {
		pool := x509.NewCertPool()
		pool.AddCert(by.certificate)
		_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: name, CurrentTime: at})
		return err
	}
	if err := verify(first.Leaf, made, apiHost, now); err != nil {
		t.Error(err)
	}
	if verify(first.Leaf, other, apiHost, now) == nil || bytes.Equal(made.certificate.RawSubject, other.certificate.RawSubject) {
		t.Error("another VM's authority has certified it")
	}
	if _, err := made.leaf("other.example"); err == nil {
		t.Error("it certifies another host")
	}
	made.hosts = append(made.hosts, "other.example") // as one who has the key could
	foreign, err := made.leaf("other.example")
	if err != nil {
		t.Fatal(err)
	}
	if verify(foreign.Leaf, made, "other.example", now) == nil {
		t.Error("guests take its certificate for a host that it is not for")
	}
	if again, _ := made.leaf(apiHost); again != first {
		t.Error("a certificate that is good is made again")
	}
	now = now.Add(leafTime - leafLeft + time.Minute)
	if again, err := made.leaf(apiHost); err != nil || verify(again.Leaf, made, apiHost, now) != nil || again == first {
		t.Errorf("after %s: %v", leafTime-leafLeft, err)
	}
}

func TestHas(t *testing.T) {
	t.Parallel()
	i, err := New(Options{Secrets: []Secret{{Name: "A", Placeholder: "p", Value: "v", Targets: []Target{{apiHost, 443}, {"b.example", 8443}}}}})
	if err != nil {
		t.Fatal(err)
	}
	for to, want := range map[Target]bool{
		{apiHost, 443}: true, {"API.example.", 443}: true, {"b.example", 8443}: true,
		{apiHost, 8443}: false, {"x." + apiHost, 443}: false, {"", 443}: false,
	} {
		if got := i.Has(to); got != want {
			t.Errorf("%s: %t", to, got)
		}
	}
	if !i.HasPort(443) || !i.HasPort(8443) || i.HasPort(80) {
		t.Error("ports")
	}
	for _, bad := range []Secret{{Name: "A"}, {Placeholder: "p", Value: "v"}, {Value: "v", Targets: []Target{{apiHost, 443}}}} {
		if _, err := New(Options{Secrets: []Secret{bad}}); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
}

// Whatever a guest sends in a header, a value comes out only where a placeholder was, and what
// comes out is bounded.
func FuzzFill(f *testing.F) {
	f.Add("Authorization", basic("u:"+theHolder))
	f.Add("X", theHolder+theHolder)
	f.Add("Authorization", "Basic "+theHolder)
	f.Add("Authorization", "basic  "+base64.StdEncoding.EncodeToString([]byte(theHolder+"\x00")))
	f.Fuzz(func(t *testing.T, name, value string) {
		const secret = "\x01value\x01" // which no text that is sent has
		if strings.Contains(value, "\x01") {
			return
		}
		r := newReplacer([]Secret{{Name: "A", Placeholder: theHolder, Value: secret}})
		header := http.Header{name: {value}}
		used, ok := r.fill(header)
		got := header[name][0]
		if changed := got != value; changed != (len(used) > 0) && ok {
			t.Errorf("%q: %q, used %q", value, got, used)
		}
		if len(got) > len(value)+2*maxHeader {
			t.Errorf("%d bytes of %d", len(got), len(value))
		}
		if len(used) == 0 && strings.Contains(got, secret) {
			t.Errorf("%q: %q, and nobody knows", value, got)
		}
		r.hide(header)
		if strings.Contains(header[name][0], secret) {
			t.Errorf("%q is not hidden", got)
		}
	})
}
