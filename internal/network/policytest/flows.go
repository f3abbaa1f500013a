package policytest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// FlowPorts are the ports at which the world of the tests of flows has servers.
func FlowPorts() Ports { return Ports{TCP: []uint16{443, 8080, 22}, UDP: []uint16{4000}} }

func goodAddr() netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, 1}) }
func badAddr() netip.Addr  { return netip.AddrFrom4([4]byte{203, 0, 113, 2}) }
func rawAddr() netip.Addr  { return netip.AddrFrom4([4]byte{203, 0, 113, 3}) }

// Open connects the guest over TCP, and has it say something, if there is anything, and be
// welcome.
func (w *World) Open(to netip.AddrPort, text []byte) net.Conn {
	w.Helper()
	conn, err := w.DialTCP(to)
	w.must(err)
	w.Cleanup(func() { _ = conn.Close() })
	if text != nil && !w.isWelcome(conn, text) {
		w.Fatalf("%s does not answer", to)
	}
	return conn
}

// MustGoOn checks that a connection that was welcome is open still.
func (w *World) MustGoOn(conn net.Conn) {
	w.Helper()
	w.must(conn.SetDeadline(time.Now().Add(Patience)))
	answer := make([]byte, 5)
	_, err := io.WriteString(conn, "hello")
	if err == nil {
		_, err = io.ReadFull(conn, answer)
	}
	if err != nil || string(answer) != "hello" {
		w.Errorf("a connection does not go on: %q, %v", answer, err)
	}
}

// MustEnd checks that a connection is broken off.
func (w *World) MustEnd(what string, conn net.Conn) {
	w.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(Patience))
	if _, err := conn.Read(make([]byte, 1)); err == nil || isTimeout(err) || errors.Is(err, io.EOF) {
		w.Errorf("a connection to %s is not broken off: %v", what, err)
	}
}

// SendFirst has the guest send a datagram, and waits until it has arrived.
func (w *World) SendFirst(to netip.AddrPort) net.Conn {
	w.Helper()
	conn, err := w.DialUDP(to)
	w.must(err)
	w.Cleanup(func() { _ = conn.Close() })
	if _, err := conn.Write([]byte("before")); err != nil {
		w.Fatal(err)
	}
	if got := w.Arrived(); got != "before" {
		w.Fatalf("%q arrives", got)
	}
	return conn
}

// Arrived returns the next datagram that has arrived.
func (w *World) Arrived() string {
	w.Helper()
	select {
	case got := <-w.datagrams:
		return got
	case <-time.After(Patience):
		w.Fatal("no datagram arrives")
		return ""
	}
}

// MustBeRefused checks that the guest is told that no datagram gets out by a socket any more, and
// that none does.
func (w *World) MustBeRefused(conn net.Conn) {
	w.Helper()
	if _, err := conn.Write([]byte("after")); err == nil {
		if err = awaitRefusal(conn); !isRefusal(err) {
			w.Errorf("a flow of datagrams goes on: %v", err)
		}
	}
	select {
	case got := <-w.datagrams:
		w.Errorf("%q arrives", got)
	default:
	}
}

// ChangeInMidFlow checks that a policy that is changed has effect on what is open, and on
// nothing else.
func (w *World) ChangeInMidFlow() {
	w.Helper()
	w.Set(PolicyOf(w, network.DefaultAllow, "deny 192.0.2.0/24"))
	w.Resolve("good.example", goodAddr())
	w.Resolve("bad.example", badAddr())
	hello := func(name string) []byte { return ClientHello(w, name) }
	https := func(addr netip.Addr) netip.AddrPort { return netip.AddrPortFrom(addr, 443) }
	raw := netip.AddrPortFrom(rawAddr(), 8080)
	stays := w.Open(https(goodAddr()), hello("good.example"))
	ends := map[string]net.Conn{
		"another name":                    w.Open(https(badAddr()), hello("bad.example")),
		"the name, forged":                w.Open(https(badAddr()), hello("good.example")),
		"another name of the same server": w.Open(https(goodAddr()), hello("other.example")),
		"a raw address":                   w.Open(raw, []byte("\x00first")),
		"a raw address, idle":             w.Open(raw, nil),
	}
	datagrams := w.SendFirst(netip.AddrPortFrom(badAddr(), 4000))
	silent := w.Open(https(goodAddr()), nil) // it has stated no name yet
	w.Set(PolicyOf(w, network.DefaultDeny, "allow good.example"))
	for name, conn := range ends {
		w.MustEnd(name, conn)
	}
	w.MustGoOn(stays)
	if !w.isWelcome(silent, hello("good.example")) {
		w.Error("a connection that is still allowed has ended")
	}
	w.MustBeRefused(datagrams)
	// Older ones are refused.
	if err := w.SetEgress(network.Egress{Revision: w.revision - 1}); err == nil {
		w.Error("a policy of before is put in force")
	}
	w.Set(network.Policy{})
	w.Open(raw, []byte("\x00first"))
	w.MustGoOn(stays)
}

// FirstBytes checks that what decides may come in parts, late or never, and may be garbage.
func (w *World) FirstBytes() {
	w.Helper()
	to := netip.AddrPortFrom(goodAddr(), 443)
	w.Set(PolicyOf(w, network.DefaultDeny, "allow good.example"))
	w.Resolve("good.example", goodAddr())
	whole := ClientHello(w, "good.example")
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
		"forged":       {[][]byte{ClientHello(w, "bad.example")}, false, false},
	} {
		conn := w.Open(to, nil)
		last := len(test.parts) - 1
		for _, part := range test.parts[:last] {
			_, _ = conn.Write(part)
		}
		if test.ends {
			_, _ = conn.Write(test.parts[last])
			_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			w.MustEnd(name, conn)
		} else if got := w.isWelcome(conn, test.parts[last]); got != test.want {
			w.Errorf("%s: gets out: %t, want %t", name, got, test.want)
		}
		_ = conn.Close()
	}
}

// NameBeforeConnecting checks that a flow that is denied unless it states a name is connected to
// the outside only then. It returns a connection that has stated none yet.
func (w *World) NameBeforeConnecting() net.Conn {
	w.Helper()
	to := netip.AddrPortFrom(goodAddr(), 443)
	w.Set(network.Policy{})
	w.Resolve("good.example", goodAddr())
	w.Resolve("bad.example", goodAddr())
	w.Set(PolicyOf(w, network.DefaultDeny, "deny bad.example", "allow good.example"))
	for name, want := range map[string]bool{"good.example": true, "bad.example": false} {
		if got := w.reaches(network.Flow{Protocol: smolvm.TCP, To: to}, ClientHello(w, name)); got != want {
			w.Errorf("%s: gets out: %t, want %t", name, got, want)
		}
	}
	return w.Open(to, nil)
}
