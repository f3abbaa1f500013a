package usernet

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/smolvm/smolvm/internal/network/nettest"
)

// deafGuest is a guest whose TCP is written by hand: it opens connections and ends its
// side of each, and never acknowledges what it is sent.
type deafGuest struct {
	testing.TB
	link   net.Conn
	to     netip.AddrPort
	opened chan bool // per answer: whether a connection was established, or refused
}

func newDeafGuest(t testing.TB, n *Network, to netip.AddrPort) *deafGuest {
	t.Helper()
	g := &deafGuest{TB: t, link: linkConn(t, n), to: to, opened: make(chan bool, 1000)}
	if _, err := g.link.Write(arpRequest(testConfig())); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.answer()
	}()
	t.Cleanup(func() {
		_ = g.link.Close()
		<-done
	})
	return g
}

func (g *deafGuest) send(port uint16, flags header.TCPFlags, number, acknowledged uint32) {
	from := netip.AddrPortFrom(testConfig().Guest, port)
	_, _ = g.link.Write(ethernet(testConfig(), etherTypeIPv4, tcpSegment(from, g.to, flags, number, acknowledged)))
}

// answer ends the guest's side of each connection that is established.
func (g *deafGuest) answer() {
	frame := make([]byte, 2048)
	for {
		size, err := g.link.Read(frame)
		if err != nil {
			return
		}
		if size < ethernetHeader+ipv4MinHeader+header.TCPMinimumSize || binary.BigEndian.Uint16(frame[12:]) != etherTypeIPv4 ||
			frame[ethernetHeader+9] != protocolTCP {
			continue
		}
		tcp := header.TCP(frame[ethernetHeader+ipv4MinHeader : size])
		switch flags := tcp.Flags(); {
		case flags.Contains(header.TCPFlagSyn | header.TCPFlagAck):
			g.send(tcp.DestinationPort(), header.TCPFlagAck, 2, tcp.SequenceNumber()+1)
			g.send(tcp.DestinationPort(), header.TCPFlagAck|header.TCPFlagFin, 2, tcp.SequenceNumber()+1)
			g.opened <- true
		case flags.Contains(header.TCPFlagRst) && tcp.AckNumber() == 2: // of a SYN
			g.opened <- false
		}
	}
}

// open tries to open a connection.
func (g *deafGuest) open(port uint16) bool {
	g.Helper()
	g.send(port, header.TCPFlagSyn, 1, 0)
	select {
	case opened := <-g.opened:
		return opened
	case <-time.After(patience):
		g.Fatal("the network does not answer")
		return false
	}
}

// A guest that takes nothing of what is left in connections has no more of them than it
// may have, however many it has let be closed (S10).
func TestUnacknowledged(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	var listener net.Listener
	nettest.NewOutside(t).Run(func() (err error) {
		listener, err = net.Listen("tcp4", nettest.OutsideAddr().String()+":8080")
		return err
	})
	defer func() { _ = listener.Close() }()
	served := make(chan struct{}, 1000)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(io.Discard, conn)
				_, _ = conn.Write(make([]byte, 100<<10))
				_ = conn.Close()
				served <- struct{}{}
			}()
		}
	}()
	limits := usualLimits()
	limits.outgoing, limits.linger = 8, 3*time.Second
	n := newLimited(t, limits)
	g := newDeafGuest(t, n, netip.AddrPortFrom(nettest.OutsideAddr(), 8080))
	opened := 0
	for port := range uint16(3 * limits.outgoing) {
		if g.open(1000 + port) {
			opened++
			<-served
		}
	}
	if opened != limits.outgoing {
		t.Errorf("%d connections hold what the guest does not take, want %d", opened, limits.outgoing)
	}
	began := time.Now()
	for port := uint16(2000); !g.open(port); port++ {
		if time.Since(began) > patience {
			t.Fatal("connections that the guest does not take are kept for ever")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// All connections together hold no more than they should.
func TestBufferTotal(t *testing.T) {
	a := newAccount(0)
	first, second := &kind{account: a, limit: usualLimits().outgoing}, &kind{account: a, limit: usualLimits().incoming}
	var all []*reservation
	for _, k := range []*kind{first, second} {
		for {
			r, err := k.reserve()
			if err != nil {
				break
			}
			all = append(all, r)
		}
	}
	if want := first.limit + second.limit; len(all) != want {
		t.Errorf("%d connections, want %d", len(all), want)
	}
	if all[0].buffer != tcpBuffer || all[len(all)-1].buffer != minBuffer || a.held > 64<<20 {
		t.Errorf("buffers of %d to %d bytes, %d in all", all[0].buffer, all[len(all)-1].buffer, a.held)
	}
	for _, r := range all {
		r.release()
		r.release() // again does no harm
	}
	if a.held != 0 || first.count != 0 || second.count != 0 {
		t.Errorf("%d bytes of %d connections stay behind", a.held, first.count+second.count)
	}
	a.close()
	if _, err := first.reserve(); err == nil {
		t.Error("a connection begins after the end")
	}
}

// What is broken off on one side is broken off on the other, and does not seem complete.
func TestBrokenOff(t *testing.T) {
	n := newNetwork(t)
	ended := make(chan error, 1)
	newGuest(t, n).listen(func(conn net.Conn) {
		_, _ = io.WriteString(conn, "hello")
		_, err := io.Copy(io.Discard, conn)
		ended <- err
	})
	listener := listenHost(t)
	n.Forward(listener, echoPort)
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "half of it"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, len("hello"))); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil { // closing resets the connection then
		t.Fatal(err)
	}
	_ = conn.Close()
	if err := <-ended; err == nil {
		t.Error("what was broken off ends in the guest as if it were complete")
	}
}
