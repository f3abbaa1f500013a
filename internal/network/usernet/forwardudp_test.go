package usernet

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/smolvm/smolvm/internal/network/outbound"
)

// echoDatagrams sends back all datagrams that come to a socket, until it is closed.
func echoDatagrams(conn net.PacketConn) {
	datagram := make([]byte, outbound.MaxDatagram)
	for {
		size, from, err := conn.ReadFrom(datagram)
		if err != nil {
			return
		}
		_, _ = conn.WriteTo(datagram[:size], from)
	}
}

// echoPackets has the guest send back all datagrams that come to its echoPort.
func (g *guest) echoPackets() {
	g.Helper()
	at := full(netip.AddrPortFrom(testConfig().Guest, echoPort))
	conn, err := gonet.DialUDP(g.Stack, &at, nil, ipv4.ProtocolNumber)
	if err != nil {
		g.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		echoDatagrams(conn)
	}()
	g.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
}

func listenPackets(t testing.TB, at string) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.UDPConn)
}

func dialPackets(t testing.TB, to string) net.Conn {
	t.Helper()
	conn, err := net.Dial("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Each sender gets its own answers, at whichever address of the host it asked (M2).
func TestForwardPackets(t *testing.T) {
	n := newNetwork(t)
	newGuest(t, n).echoPackets()
	for _, at := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"} {
		socket := listenPackets(t, at)
		n.ForwardPackets(socket, echoPort)
		port := socket.LocalAddr().(*net.UDPAddr).Port
		targets := []string{"127.0.0.1", "127.0.0.2"} // the second is not what the kernel would answer from
		switch at {
		case "127.0.0.1:0":
			targets = targets[:1]
		case "[::1]:0":
			targets = []string{"::1"}
		case "[::]:0":
			targets = append(targets, "::1")
		}
		for _, target := range targets {
			to := net.JoinHostPort(target, fmt.Sprint(port))
			first, second := dialPackets(t, to), dialPackets(t, to)
			for i := range 3 {
				exchangeDatagram(t, first, fmt.Sprintf("first %d by %s", i, to))
				exchangeDatagram(t, second, fmt.Sprintf("second %d by %s", i, to))
			}
			exchangeDatagram(t, first, strings.Repeat("long ", 5000))
		}
	}
}

// There are no more sessions than there may be; those that are idle make place. When a
// forward is closed nothing of it stays.
func TestForwardPacketsLimit(t *testing.T) {
	n := newNetwork(t)
	newGuest(t, n).echoPackets()
	socket := listenPackets(t, "127.0.0.1:0")
	forward := n.ForwardPackets(socket, echoPort)
	for i := range maxSessions + 20 {
		exchangeDatagram(t, dialPackets(t, socket.LocalAddr().String()), fmt.Sprint("datagram ", i))
		if count := n.sessions.Count(); count > maxSessions {
			t.Fatalf("%d sessions, want at most %d", count, maxSessions)
		}
	}
	if err := forward.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if count := n.sessions.Count(); count != 0 {
		t.Errorf("%d sessions stay behind", count)
	}
	_ = forward.Close() // again does no harm
	again := listenPackets(t, socket.LocalAddr().String())
	n.ForwardPackets(again, echoPort)
	exchangeDatagram(t, dialPackets(t, again.LocalAddr().String()), "once more")
}

// A port where nothing listens in the guest yet works as soon as something does.
func TestForwardPacketsLater(t *testing.T) {
	n := newNetwork(t)
	g := newGuest(t, n)
	socket := listenPackets(t, "127.0.0.1:0")
	n.ForwardPackets(socket, echoPort)
	conn := dialPackets(t, socket.LocalAddr().String())
	if _, err := conn.Write([]byte("too early")); err != nil {
		t.Fatal(err)
	}
	// It is refused, or in the end it comes too early no more: either does no harm.
	time.Sleep(100 * time.Millisecond)
	g.echoPackets()
	if _, err := conn.Write([]byte("in time")); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 100)
	for {
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		size, err := conn.Read(answer)
		if err != nil {
			t.Fatal(err)
		}
		if string(answer[:size]) == "in time" {
			return
		}
	}
}
