package usernet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/outbound"
	"github.com/smolvm/smolvm/internal/network/resolver"
)

// hostAddrs lists the host's own addresses, and those that mean it or all its
// neighbours.
func hostAddrs(t testing.TB) []netip.Addr {
	t.Helper()
	list := []netip.Addr{
		testConfig().Gateway,
		netip.MustParseAddr("0.0.0.0"),
		netip.MustParseAddr("0.0.0.1"),
		netip.MustParseAddr("127.0.0.1"),
		netip.MustParseAddr("127.1.2.3"),
		netip.MustParseAddr("169.254.169.254"), // where clouds have their metadata
		netip.MustParseAddr("224.0.0.1"),       // all hosts of a link
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range addrs {
		prefix, err := netip.ParsePrefix(addr.String())
		if err != nil || !prefix.Addr().Is4() || prefix.Addr().IsLoopback() {
			continue
		}
		list = append(list, prefix.Addr(), network.Last(prefix))
	}
	return list
}

// What listens on the host is out of the guest's reach, on whichever address.
func TestHostUnreachable(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	listener, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	port := uint16(listener.Addr().(*net.TCPAddr).Port)
	n := newNetwork(t)
	g := newGuest(t, n)
	nettest.NewOutside(t) // gives the host an address that the network does not know of
	var dials sync.WaitGroup
	for _, addr := range hostAddrs(t) {
		dials.Go(func() {
			to := netip.AddrPortFrom(addr, port)
			// Some are refused, and some get no answer, as the guest has no neighbours.
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			if conn, err := gonet.DialContextTCP(ctx, g.Stack, full(to), ipv4.ProtocolNumber); err == nil {
				t.Errorf("the guest is connected to %s", to)
				_ = conn.Close()
			}
		})
		_, _ = g.dialUDP(netip.AddrPortFrom(addr, port)).Write([]byte("hello"))
	}
	dials.Wait()
	// The guest's frames are handled in order, so by now a flow has been made of each
	// datagram that is let through.
	ask(t, packetConn{g.dialUDP(netip.AddrPortFrom(testConfig().Gateway, dnsPort))}, "localhost.", dns.TypeA)
	for _, f := range n.outbound.Flows() {
		t.Errorf("datagrams get to %s", f.To)
	}
}

// Nothing is open on the gateway but the services of the network.
func TestGatewayPorts(t *testing.T) {
	n := newNetwork(t)
	g := newGuest(t, n)
	for _, port := range []uint16{22, 67, 80, 443, 2375, 7777, 8080} {
		if conn, err := g.dialTCP(netip.AddrPortFrom(testConfig().Gateway, port)); err == nil {
			t.Errorf("port %d of the gateway is open", port)
			_ = conn.Close()
		}
	}
	conn, err := g.dialTCP(netip.AddrPortFrom(testConfig().Gateway, dnsPort))
	if err != nil {
		t.Fatalf("DNS over TCP: %v", err)
	}
	_ = conn.Close()
}

// exchangeOutside has a guest connect to a listener at port 8080 outside, and checks that what
// both send each other arrives.
func exchangeOutside(t *testing.T, g *guest, listener net.Listener) {
	t.Helper()
	sums := make(chan [2][32]byte, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		sent, received, _ := exchange(conn, 1)
		sums <- [2][32]byte{sent, received}
	}()
	conn, err := g.dialTCP(netip.AddrPortFrom(nettest.OutsideAddr(), 8080))
	if err != nil {
		t.Fatal(err)
	}
	sent, received, err := exchange(conn, 2)
	if err != nil {
		t.Fatal(err)
	}
	if got := <-sums; got != [2][32]byte{received, sent} {
		t.Error("what arrives is not what was sent")
	}
}

func TestOutboundTCP(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	var listener net.Listener
	nettest.NewOutside(t).Run(func() (err error) {
		listener, err = net.Listen("tcp4", nettest.OutsideAddr().String()+":8080")
		return err
	})
	n := newNetwork(t)
	g := newGuest(t, n)
	exchangeOutside(t, g, listener)
	// A port that is closed outside is closed for the guest.
	_ = listener.Close()
	if conn, err := g.dialTCP(netip.AddrPortFrom(nettest.OutsideAddr(), 8080)); err == nil {
		t.Error("a connection to a closed port succeeds")
		_ = conn.Close()
	}
}

func TestOutboundUDP(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	var server net.PacketConn
	nettest.NewOutside(t).Run(func() (err error) {
		server, err = net.ListenPacket("udp4", nettest.OutsideAddr().String()+":8080")
		return err
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		echoDatagrams(server)
	}()
	defer func() {
		_ = server.Close()
		<-done
	}()
	n := newNetwork(t)
	g := newGuest(t, n)
	// More flows than there can be: those that are idle make place.
	for i := range outbound.MaxFlows + 20 {
		conn := g.dialUDP(netip.AddrPortFrom(nettest.OutsideAddr(), 8080))
		for range 2 {
			exchangeDatagram(t, conn, fmt.Sprint("datagram ", i))
		}
	}
	if flows := n.outbound.Flows(); len(flows) > outbound.MaxFlows {
		t.Errorf("%d flows, want at most %d", len(flows), outbound.MaxFlows)
	}
	// Fragments, both ways.
	exchangeDatagram(t, g.dialUDP(netip.AddrPortFrom(nettest.OutsideAddr(), 8080)), strings.Repeat("long ", 5000))
}

func exchangeDatagram(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, outbound.MaxDatagram)
	_, err := io.WriteString(conn, text)
	if err == nil {
		var size int
		size, err = conn.Read(answer)
		answer = answer[:size]
	}
	if err != nil || string(answer) != text {
		t.Fatalf("send %d bytes: got %d bytes, %v", len(text), len(answer), err)
	}
}

// Closing the network ends what is under way to the outside.
func TestCloseOutbound(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	var listener net.Listener
	nettest.NewOutside(t).Run(func() (err error) {
		listener, err = net.Listen("tcp4", nettest.OutsideAddr().String()+":8080")
		return err
	})
	defer func() { _ = listener.Close() }()
	n := newNetwork(t)
	g := newGuest(t, n)
	if _, err := g.dialTCP(netip.AddrPortFrom(nettest.OutsideAddr(), 8080)); err != nil {
		t.Fatal(err)
	}
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := g.dialUDP(netip.AddrPortFrom(nettest.OutsideAddr(), 8081)).Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection outlives the network: %v", err)
	}
}

// A network carries packets that are longer than Ethernet's, and serves a guest whose own MTU is
// Ethernet's, as is that of one which was saved before.
func TestLongPackets(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	var listener net.Listener
	var packets net.PacketConn
	nettest.NewOutside(t).Run(func() (err error) {
		if listener, err = net.Listen("tcp4", nettest.OutsideAddr().String()+":8080"); err != nil {
			return err
		}
		packets, err = net.ListenPacket("udp4", nettest.OutsideAddr().String()+":8080")
		return err
	})
	var echoes sync.WaitGroup
	echoes.Go(func() { echoDatagrams(packets) })
	defer func() {
		_, _ = listener.Close(), packets.Close()
		echoes.Wait()
	}()
	for _, mtu := range []uint32{defaultMTU, network.UserMTU} {
		config := testConfig()
		config.MTU = network.UserMTU
		n, err := newWith(config, usualLimits(), resolver.HostFiles())
		if err != nil {
			t.Fatal(err)
		}
		g := newGuestMTU(t, n, mtu)
		exchangeOutside(t, g, listener)
		if datagrams := g.dialUDP(netip.AddrPortFrom(nettest.OutsideAddr(), 8080)); mtu == network.UserMTU {
			exchangeDatagram(t, datagrams, strings.Repeat("long ", 13000))
		} else {
			exchangeDatagram(t, datagrams, strings.Repeat("long ", 250))
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}
