package shim_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/tapnet"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
)

// serveVisits answers HTTP at an address in the namespace of the calling thread, and tells who
// came for what.
func serveVisits(t *testing.T, addr string, visits chan<- string) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(addr, "80"))
	if err != nil {
		return err
	}
	server := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		select {
		case visits <- from + r.URL.Path:
		default:
		}
		_, _ = fmt.Fprint(w, "hello")
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return nil
}

// A real guest on a TAP interface reaches the outside by NAT and not the host, and is reached
// by its own address, by the shim, and by a forward. When it has ended nothing is left on the
// host.
func TestRealVMOnTAP(t *testing.T) {
	testenv.RequireQEMU(t)
	testenv.Image(t) // it is made from packages, which the test's own network does not have
	if !nettest.InOwnNetwork(t) {
		return
	}
	const hostAddr, outsideAddr = "198.51.100.1", "203.0.113.7"
	visits, toHost := make(chan string, 10), make(chan string, 10)
	out := nettest.New(t)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "out0", PeerNamespace: netlink.NsFd(out.FD()),
	}))
	check(nettest.Configure("up0", hostAddr+"/24"))
	check(nettest.Route("0.0.0.0/0", "198.51.100.2", ""))
	check(out.Do(func() error {
		return errors.Join(
			nettest.Configure("out0", "198.51.100.2/24"), nettest.Configure("lo", outsideAddr+"/32"),
			serveVisits(t, outsideAddr, visits))
	}))
	check(serveVisits(t, hostAddr, toHost))

	f := newRealFixture(t)
	at, err := network.Plan(network.TAP, 2)
	check(err)
	config := at.Config()
	spec := &f.opts.Spec
	spec.Network, spec.VMM.NIC = &config, &vmm.NIC{MAC: at.MAC}
	spec.Hello.Network = &wire.Network{
		MAC: at.MAC, Address: netip.PrefixFrom(at.Guest, at.Prefix.Bits()), Gateway: at.Gateway, DNS: []netip.Addr{at.DNS},
	}
	visit := func(addr, path string) string {
		return `printf 'GET ` + path + ` HTTP/1.0\r\n\r\n' | nc ` + addr + ` 80; `
	}
	spec.WarmUp = visit(hostAddr, "/host") + visit(outsideAddr, "/outside")
	launched := f.launch()
	client := f.client()
	select {
	case got := <-visits:
		if got != hostAddr+"/outside" {
			t.Errorf("outside came %q, want the host's address", got)
		}
	case <-time.After(patience):
		t.Error("the guest does not reach the outside")
	}
	if len(toHost) > 0 {
		t.Errorf("the guest reached the host: %q", <-toHost)
	}
	added, err := client.AddForward(t.Context(), shim.Forward{Host: netip.MustParseAddrPort("127.0.0.1:0"), GuestPort: 22})
	check(err)
	for name, dial := range map[string]func() (net.Conn, error){
		"its address": func() (net.Conn, error) { return net.Dial("tcp", net.JoinHostPort(at.Guest.String(), "22")) },
		"the shim":    func() (net.Conn, error) { return client.DialGuest(t.Context(), 22) },
		"a forward":   func() (net.Conn, error) { return net.Dial("tcp", added.Host.String()) },
	} {
		if got := banner(t, dial); !strings.HasPrefix(got, "SSH-2.0-") {
			t.Errorf("by %s the guest says %q", name, got)
		}
	}
	f.stop(patience)
	if record := f.end(launched); record.Exit.Reason != vmm.ExitPowerOff {
		t.Errorf("exit record is %+v", record)
	}
	if _, err := netlink.LinkByName(at.TAP); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("interface %s afterwards: %v", at.TAP, err)
	}
	if removed, err := tapnet.Reconcile(t.Context(), func(tapnet.Owner) bool { return false }); err != nil || len(removed) > 0 {
		t.Errorf("left behind: %v, %v", removed, err)
	}
}
