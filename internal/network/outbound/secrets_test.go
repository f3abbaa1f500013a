package outbound

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/intercept"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

// secretHost is the name of the server that gets the secret.
const secretHost = "api.example"

// withSecrets is a way out with a secret, and a server outside that answers with the token that
// it gets.
func withSecrets(t *testing.T) (o *Outbound, to netip.AddrPort) {
	t.Helper()
	out := nettest.NewOutside(t)
	to = netip.AddrPortFrom(nettest.OutsideAddr(), 8443)
	certificate, roots := nettest.SelfSigned(t, secretHost, "other.example")
	for port, inTLS := range map[uint16]bool{to.Port(): true, 9443: true, 8080: false} {
		var listener net.Listener
		out.Run(func() (err error) {
			listener, err = net.Listen("tcp", netip.AddrPortFrom(to.Addr(), port).String())
			return err
		})
		server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = fmt.Fprintln(w, r.Header.Get("Authorization"))
		})}
		if inTLS {
			listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{certificate}})
		}
		go func() { _ = server.Serve(listener) }()
		t.Cleanup(func() { _ = server.Close() })
	}
	secrets, err := intercept.New(intercept.Options{Roots: roots, Secrets: []intercept.Secret{{
		Name: "T", Placeholder: "placeholder", Value: "value",
		Targets: []intercept.Target{{Host: secretHost, Port: to.Port()}, {Host: secretHost, Port: 8080}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	o = newOutbound(t)
	o.SetSecrets(secrets)
	return o, to
}

// open connects to a server, as a guest that trusts anybody.
func (g guestOf) open(to netip.AddrPort) (conn net.Conn, ended <-chan struct{}) {
	g.t.Helper()
	request, guest := newRequest(g.t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.o.Connect(to, request)
	}()
	return guest, done
}

// keptRecords keeps the records of flows.
type keptRecords struct {
	network.LateRecorder            // numbers nothing
	mu                   sync.Mutex // guards the following
	all                  []smolvm.FlowRecord
}

// Record implements [network.Recorder].
func (k *keptRecords) Record(r smolvm.FlowRecord) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.all = append(k.all, r)
}

func (k *keptRecords) last() smolvm.FlowRecord {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.all[len(k.all)-1]
}

// guestOf is the guest of a way out.
type guestOf struct {
	t *testing.T
	o *Outbound
}

// ask sends a request with a placeholder, and returns what the server got in its place.
func ask(conn net.Conn, host string) (string, error) {
	_, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+host+"\r\nAuthorization: placeholder\r\n\r\n")
	if err != nil {
		return "", err
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	defer func() { _ = answer.Body.Close() }()
	got, err := io.ReadAll(answer.Body)
	return strings.TrimSpace(string(got)), err
}

// A secret gets to its host and port by TLS alone, and only as long as the policy allows that.
// All other flows are the guest's and the server's own.
func TestSecrets(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	o, to := withSecrets(t)
	records := &keptRecords{}
	o.SetRecorder(records)
	g := guestOf{t, o}
	port := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(to.Addr(), port) }
	for _, test := range []struct {
		what, name string
		to         netip.AddrPort
		want       string
		own        bool // the server's certificate is the VM's own
	}{
		{"secret's host", secretHost, to, "value", true},
		{"in other letters", "API.Example", to, "value", true},
		{"another name there", "other.example", to, "placeholder", false},
		{"no name", "", to, "placeholder", false},
		{"another port", secretHost, port(9443), "placeholder", false},
	} {
		guest, ended := g.open(test.to)
		conn := tls.Client(guest, &tls.Config{ServerName: test.name, InsecureSkipVerify: true})
		host := test.name
		if host == "" {
			host = "x"
		}
		got, err := ask(conn, net.JoinHostPort(host, fmt.Sprint(test.to.Port())))
		if err != nil || got != test.want {
			t.Errorf("%s: %q, %v; want %q", test.what, got, err, test.want)
		}
		if err == nil {
			issuer := conn.ConnectionState().PeerCertificates[0].Issuer.String()
			if own := strings.Contains(issuer, "smolvm"); own != test.own {
				t.Errorf("%s: the certificate is by %q", test.what, issuer)
			}
		}
		_ = conn.Close()
		<-ended
	}
	// Without TLS nobody knows who the server is.
	guest, ended := g.open(port(8080))
	if got, err := ask(guest, secretHost+":8080"); got != "placeholder" || err != nil {
		t.Errorf("without TLS: %q, %v", got, err)
	}
	_ = guest.Close()
	<-ended

	guest, ended = g.open(to)
	conn := tls.Client(guest, &tls.Config{ServerName: secretHost, InsecureSkipVerify: true})
	if got, err := ask(conn, secretHost+":8443"); got != "value" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	if flows := o.Flows(); len(flows) != 1 || flows[0].Names.SNI != secretHost {
		t.Errorf("open flows: %+v", flows)
	}
	deny := network.Policy{Default: network.DefaultDeny}
	if err := o.SetEgress(network.Egress{Revision: 1, Policy: deny}); err != nil {
		t.Fatal(err)
	}
	<-ended
	if last := records.last(); last.Event != smolvm.FlowDeny || !slices.Equal(last.Secrets, []string{"T"}) {
		t.Errorf("its end is recorded as %+v", last)
	}
	if got, err := ask(conn, secretHost+":8443"); err == nil {
		t.Errorf("a flow that is not allowed any more goes on: %q", got)
	}
	request, _ := newRequest(t)
	if o.Connect(to, request); !request.refused {
		t.Error("a flow that is not allowed is not refused")
	}
}
