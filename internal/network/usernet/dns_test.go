package usernet

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/miekg/dns"
)

func TestDNS(t *testing.T) {
	n := newNetwork(t)
	g := newGuest(t, n)
	server := netip.AddrPortFrom(testConfig().Gateway, dnsPort)
	overTCP, err := g.dialTCP(server)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = overTCP.Close() }()
	for network, conn := range map[string]net.Conn{"UDP": packetConn{g.dialUDP(server)}, "TCP": overTCP} {
		for _, question := range []struct {
			name string
			kind uint16
			want []string
		}{
			// What needs no network; see RFC 6761, section 6.3.
			{"localhost.", dns.TypeA, []string{"localhost.\t0\tIN\tA\t127.0.0.1"}},
			{"LocalHost.", dns.TypeA, []string{"LocalHost.\t0\tIN\tA\t127.0.0.1"}},
			{"localhost.", dns.TypeAAAA, nil}, // the guest has no IPv6
			{"localhost.", dns.TypeHINFO, nil},
		} {
			answer := ask(t, conn, question.name, question.kind)
			var got []string
			for _, record := range answer.Answer {
				got = append(got, record.String())
			}
			slices.Sort(got) // some hosts have several lines for it
			if got = slices.Compact(got); !slices.Equal(got, question.want) || answer.Rcode != dns.RcodeSuccess {
				t.Errorf("over %s, %s %s is %q (%s), want %q", network, question.name,
					dns.TypeToString[question.kind], got, dns.RcodeToString[answer.Rcode], question.want)
			}
		}
	}
}

// ask asks one question.
func ask(t testing.TB, conn net.Conn, name string, kind uint16) *dns.Msg {
	t.Helper()
	client := dns.Client{Timeout: patience}
	question := new(dns.Msg).SetQuestion(name, kind)
	answer, _, err := client.ExchangeWithConn(question, &dns.Conn{Conn: conn})
	if err != nil {
		t.Fatalf("ask for %s: %v", name, err)
	}
	return answer
}

// packetConn makes a connected conn a [net.PacketConn], by which the client tells
// UDP from TCP.
type packetConn struct{ net.Conn }

func (c packetConn) ReadFrom(p []byte) (int, net.Addr, error) {
	n, err := c.Read(p)
	return n, c.RemoteAddr(), err
}

func (c packetConn) WriteTo(p []byte, _ net.Addr) (int, error) { return c.Write(p) }
