package usernet

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

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
