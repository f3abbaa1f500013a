package tapnet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/intercept"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/resolver"
)

// Secrets are put into the flows of a guest on a TAP interface too: of real packets, of which the
// kernel leads none around the shim, although a rule about addresses alone lets them out.
func TestSecrets(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	const host = "api.example"
	out := newOutside(t)
	certificate, roots := nettest.SelfSigned(t, host)
	at := netip.AddrPortFrom(netip.MustParseAddr(farAddr), 443)
	must(t, out.Do(func() error {
		listener, err := net.Listen("tcp", at.String())
		if err != nil {
			return err
		}
		server := &http.Server{
			ReadHeaderTimeout: patience, TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate}},
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = fmt.Fprint(w, r.Header.Get("Authorization"))
			}),
		}
		go func() { _ = server.ServeTLS(listener, "", "") }()
		t.Cleanup(func() { _ = server.Close() })
		return nil
	}))
	rule := network.Rule{Action: network.Allow, CIDR: netip.PrefixFrom(at.Addr(), 32), Protocol: smolvm.TCP}
	policy := network.Policy{Default: network.DefaultDeny, Rules: []network.Rule{rule}}
	n := newNetworkWith(t, 2, func(c *network.Config) { c.Egress = &network.Egress{Revision: 1, Policy: policy} }, resolver.HostFiles())
	secrets, err := intercept.New(intercept.Options{Roots: roots, Secrets: []intercept.Secret{{
		Name: "T", Placeholder: "placeholder", Value: "value", Targets: []intercept.Target{{Host: host, Port: at.Port()}},
	}}})
	must(t, err)
	n.SetSecrets(secrets)
	g := connectGuest(t, n)
	ask := func(trusted *x509.CertPool) (string, error) {
		client := &http.Client{Timeout: patience, Transport: &http.Transport{
			DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: trusted},
			DialContext: func(context.Context, string, string) (net.Conn, error) { return g.dialer("tcp")(at) },
		}}
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+host+"/", nil)
		must(t, err)
		request.Header.Set("Authorization", "placeholder")
		answer, err := client.Do(request)
		if err != nil {
			return "", err
		}
		defer func() { _ = answer.Body.Close() }()
		text, err := io.ReadAll(answer.Body)
		return string(text), err
	}
	authority := x509.NewCertPool()
	authority.AppendCertsFromPEM(secrets.Certificate())
	if got, err := ask(authority); got != "value" || err != nil {
		t.Errorf("the server got %q, %v", got, err)
	}
	// Without secrets the flow is the guest's and the server's own.
	n.SetSecrets(nil)
	if got, err := ask(roots); got != "placeholder" || err != nil {
		t.Errorf("without secrets the server got %q, %v", got, err)
	}
	if _, err := ask(authority); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without secrets the guest gets a certificate of the VM's authority: %v", err)
	}
}
