package usernet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

// A policy that is changed has effect on what is open, and on nothing else.
func TestChangeInMidFlow(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w := newWorld(t, []uint16{443, 8080}, []uint16{4000})
	good, bad := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")
	w.resolve("good.example", good)
	w.resolve("bad.example", bad)
	dial := func(to netip.AddrPort, text []byte) net.Conn {
		conn, err := w.g.dialTCP(to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if text != nil && !w.isWelcome(conn, text) {
			t.Fatalf("%s does not answer", to)
		}
		return conn
	}
	hello := func(name string) []byte { return policytest.ClientHello(t, name) }
	stays := dial(netip.AddrPortFrom(good, 443), hello("good.example"))
	ends := map[string]net.Conn{
		"another name":                    dial(netip.AddrPortFrom(bad, 443), hello("bad.example")),
		"the name, forged":                dial(netip.AddrPortFrom(bad, 443), hello("good.example")),
		"another name of the same server": dial(netip.AddrPortFrom(good, 443), hello("other.example")),
		"a raw address":                   dial(netip.MustParseAddrPort("203.0.113.3:8080"), []byte("\x00first")),
		"a raw address, idle":             dial(netip.MustParseAddrPort("203.0.113.3:8080"), nil),
	}
	datagrams := w.g.dialUDP(netip.AddrPortFrom(bad, 4000))
	if _, err := datagrams.Write([]byte("before")); err != nil {
		t.Fatal(err)
	}
	if got := <-w.datagrams; got != "before" {
		t.Fatalf("%q arrives", got)
	}
	silent := dial(netip.AddrPortFrom(good, 443), nil) // it has stated no name yet
	w.set(policytest.PolicyOf(t, network.DefaultDeny, "allow good.example"))
	for name, conn := range ends {
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.Read(make([]byte, 1)); err == nil || isTimeout(err) || errors.Is(err, io.EOF) {
			t.Errorf("a connection to %s is not broken off: %v", name, err)
		}
	}
	echo(t, stays)
	if !w.isWelcome(silent, hello("good.example")) {
		t.Error("a connection that is still allowed has ended")
	}
	if _, err := datagrams.Write([]byte("after")); err == nil {
		if err = awaitRefusal(datagrams); err == nil || isTimeout(err) {
			t.Errorf("a flow of datagrams goes on: %v", err)
		}
	}
	select {
	case got := <-w.datagrams:
		t.Errorf("%q arrives", got)
	default:
	}
	// Older ones are refused, and the same is no change.
	if err := w.n.SetEgress(network.Egress{Revision: w.revision - 1}); err == nil {
		t.Error("a policy of before is put in force")
	}
	w.set(network.Policy{})
	dial(netip.MustParseAddrPort("203.0.113.3:8080"), []byte("\x00first"))
	if got := w.n.EgressRevision(); got != w.revision {
		t.Errorf("revision %d, want %d", got, w.revision)
	}
}

// What decides may come in parts, late or never, and may be garbage.
func TestFirstBytesOfGuest(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w := newWorld(t, []uint16{443, 22}, nil)
	addr := netip.MustParseAddr("203.0.113.1")
	w.set(policytest.PolicyOf(t, network.DefaultDeny, "allow good.example"))
	w.resolve("good.example", addr)
	whole := policytest.ClientHello(t, "good.example")
	garbage := append(bytes.Clone(whole[:50]), bytes.Repeat([]byte{0xff}, len(whole))...)
	for name, test := range map[string]struct {
		parts [][]byte
		ends  bool // the guest says no more then
		want  bool
	}{
		"in parts":     {[][]byte{whole[:1], whole[1:7], whole[7:100], whole[100:]}, false, true},
		"and more":     {[][]byte{whole, []byte("more")}, false, true},
		"without name": {[][]byte{[]byte("\x00")}, false, true},
		"ends early":   {[][]byte{whole[:100]}, true, false},
		"garbage":      {[][]byte{garbage}, false, false},
		"too long":     {[][]byte{[]byte("GET /"), bytes.Repeat([]byte("x"), 20<<10)}, false, false},
		"forged":       {[][]byte{policytest.ClientHello(t, "bad.example")}, false, false},
	} {
		conn, err := w.g.dialTCP(netip.AddrPortFrom(addr, 443))
		if err != nil {
			t.Fatal(err)
		}
		last := len(test.parts) - 1
		for _, part := range test.parts[:last] {
			_, _ = conn.Write(part)
		}
		if test.ends {
			_, _ = conn.Write(test.parts[last])
			_ = conn.(*gonet.TCPConn).CloseWrite()
			_, err := conn.Read(make([]byte, 1))
			if err == nil || errors.Is(err, io.EOF) {
				t.Errorf("%s: %v", name, err)
			}
		} else if got := w.isWelcome(conn, test.parts[last]); got != test.want {
			t.Errorf("%s: gets out: %t, want %t", name, got, test.want)
		}
		_ = conn.Close()
	}
}

// A server that speaks first is heard, though the name that the guest may state decides.
func TestServerSpeaksFirst(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	var listener net.Listener
	nettest.NewOutside(t).Run(func() (err error) {
		listener, err = net.Listen("tcp4", nettest.OutsideAddr().String()+":22")
		return err
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(conn, "hello")
		_, _ = io.Copy(conn, conn)
		_ = conn.Close()
	}()
	defer func() {
		_ = listener.Close()
		<-done
	}()
	n := newNetwork(t)
	g := newGuest(t, n)
	n.outbound.Names().Add(nettest.OutsideAddr(), "good.example", time.Hour)
	if err := n.SetEgress(network.Egress{Policy: policytest.PolicyOf(t, network.DefaultDeny, "allow good.example:22")}); err != nil {
		t.Fatal(err)
	}
	conn, err := g.dialTCP(netip.AddrPortFrom(nettest.OutsideAddr(), 22))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	greeting := make([]byte, 5)
	if _, err := io.ReadFull(conn, greeting); err != nil || string(greeting) != "hello" {
		t.Fatalf("%q, %v", greeting, err)
	}
	if _, err := io.WriteString(conn, "SSH-2.0-x\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, greeting); err != nil || string(greeting) != "SSH-2" {
		t.Errorf("%q, %v", greeting, err)
	}
}

// A flow that is denied unless it states a name is connected to the outside only then.
func TestNameBeforeConnecting(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	w := newWorld(t, []uint16{443}, nil)
	addr := netip.MustParseAddr("203.0.113.1")
	w.resolve("good.example", addr)
	w.resolve("bad.example", addr)
	w.set(policytest.PolicyOf(t, network.DefaultDeny, "deny bad.example", "allow good.example"))
	for name, want := range map[string]bool{"good.example": true, "bad.example": false} {
		if got := w.reaches(network.Flow{Protocol: smolvm.TCP, To: netip.AddrPortFrom(addr, 443)}, policytest.ClientHello(t, name)); got != want {
			t.Errorf("%s: gets out: %t, want %t", name, got, want)
		}
	}
	// Closing the network ends one that waits.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := gonet.DialContextTCP(ctx, w.g.Stack, full(netip.AddrPortFrom(addr, 443)), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := w.n.Close(); err != nil {
		t.Error(err)
	}
}
