package usernet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
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

// A host that can't find out is not one that knows better.
func TestDNSFailure(t *testing.T) {
	if !inOwnNetwork(t) { // where no name server can be reached
		return
	}
	n := newNetwork(t)
	conn := newGuest(t, n).dialUDP(netip.AddrPortFrom(testConfig().Gateway, dnsPort))
	if answer := ask(t, packetConn{conn}, "smolvm.example.", dns.TypeA); answer.Rcode != dns.RcodeServerFailure {
		t.Errorf("the answer is %s, want a failure", dns.RcodeToString[answer.Rcode])
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

// Beyond the limit questions fail at once.
func TestLookupLimit(t *testing.T) {
	r := newResolver()
	defer func() { _ = r.Close() }()
	for range maxLookups {
		r.slots <- struct{}{}
	}
	question := dns.Question{Name: "localhost.", Qtype: dns.TypeA}
	if _, err := r.lookup(question); !errors.Is(err, errBusy) {
		t.Errorf("lookup: %v, want %v", err, errBusy)
	}
	<-r.slots
	if _, err := r.lookup(question); err != nil {
		t.Errorf("lookup: %v", err)
	}
}

func TestRcode(t *testing.T) {
	notFound, timeout := &net.DNSError{IsNotFound: true}, &net.DNSError{IsTimeout: true}
	for _, test := range []struct {
		kind uint16
		err  error
		want int
	}{
		{dns.TypeA, notFound, dns.RcodeNameError},
		{dns.TypeTXT, notFound, dns.RcodeSuccess},
		{dns.TypeA, timeout, dns.RcodeServerFailure},
		{dns.TypeA, context.Canceled, dns.RcodeServerFailure},
		{dns.TypeTXT, errBusy, dns.RcodeServerFailure},
	} {
		if got := rcode(dns.Question{Qtype: test.kind}, test.err); got != test.want {
			t.Errorf("rcode(%s, %v) = %s, want %s", dns.TypeToString[test.kind], test.err,
				dns.RcodeToString[got], dns.RcodeToString[test.want])
		}
	}
}

func TestReversed(t *testing.T) {
	for name, want := range map[string]string{
		"1.2.0.192.in-addr.arpa.":   "192.0.2.1",
		"1.2.0.192.IN-ADDR.ARPA.":   "192.0.2.1",
		"1.2.0.in-addr.arpa.":       "",
		"9.1.2.0.192.in-addr.arpa.": "",
		"smolvm.example.":           "",
		".":                         "",
	} {
		if got := reversed(name); got != want {
			t.Errorf("reversed(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestChunks(t *testing.T) {
	for length, want := range map[int][]int{0: {0}, 255: {255}, 256: {255, 1}, 600: {255, 255, 90}} {
		var got []int
		for _, chunk := range chunks(strings.Repeat("x", length)) {
			got = append(got, len(chunk))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d bytes are cut into %d, want %d", length, got, want)
		}
	}
}
