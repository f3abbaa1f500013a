package outbound

import (
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

// pipeRequest is a connection that the guest asks for by a socket pair.
type pipeRequest struct {
	fakeRequest
	conn net.Conn
}

type tcpConn struct{ *net.TCPConn }

func (c tcpConn) Abort() {
	_ = c.SetLinger(0)
	_ = c.Close()
}

func (r *pipeRequest) Accept() (GuestConn, error) { return tcpConn{r.conn.(*net.TCPConn)}, nil }

// newRequest returns a request, and the guest's end of its connection.
func newRequest(t *testing.T) (*pipeRequest, net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	guest, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = guest.Close() })
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return &pipeRequest{conn: conn}, guest
}

// Flows get to the outside by IPv4 and IPv6, are listed while they are open, and are refused
// where nothing listens.
func TestConnect(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	out := nettest.NewOutside(t)
	const outside6 = "2001:db8:1::2"
	if err := nettest.RunIP("addr add 2001:db8:1::1/64 dev host nodad"); err != nil {
		t.Fatal(err)
	}
	out.Run(func() error { return nettest.RunIP("addr add " + outside6 + "/64 dev outside nodad") })
	for _, addr := range []string{nettest.OutsideAddr().String(), outside6} {
		t.Run(addr, func(t *testing.T) {
			var listener net.Listener
			out.Run(func() (err error) {
				listener, err = net.Listen("tcp", net.JoinHostPort(addr, "8080"))
				return err
			})
			o := newOutbound(t)
			to := netip.AddrPortFrom(netip.MustParseAddr(addr), 8080)
			request, guest := newRequest(t)
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				o.Connect(to, request)
			}()
			conn, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(guest, "question"); err != nil {
				t.Fatal(err)
			}
			text := make([]byte, 8)
			if _, err := io.ReadFull(conn, text); err != nil || string(text) != "question" {
				t.Errorf("outside hears %q, %v", text, err)
			}
			if flows := o.Flows(); len(flows) != 1 || flows[0].To != to || flows[0].Protocol != smolvm.TCP {
				t.Errorf("open flows: %v", flows)
			}
			_, _ = conn.Close(), guest.Close()
			<-ended
			if flows := o.Flows(); len(flows) != 0 {
				t.Errorf("flows that have ended are open: %v", flows)
			}
			_ = listener.Close()
			closed := &fakeRequest{}
			if o.Connect(to, closed); !closed.refused {
				t.Error("a port on which nothing listens is not refused")
			}
			datagrams, err := o.dial(&network.Flow{Protocol: smolvm.UDP, To: to})
			if err != nil {
				t.Fatalf("UDP: %v", err)
			}
			_ = datagrams.Close()
		})
	}
}
