package usernet

import (
	"errors"
	"fmt"
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
	query := new(dns.Msg).SetQuestion("localhost.", dns.TypeA)
	if _, err := r.answer(query); !errors.Is(err, errBusy) {
		t.Errorf("answer: %v, want %v", err, errBusy)
	}
	<-r.slots
	if _, err := r.answer(query); err != nil {
		t.Errorf("answer: %v", err)
	}
}

func TestReversed(t *testing.T) {
	for name, want := range map[string]string{
		"1.2.0.192.in-addr.arpa":   "192.0.2.1",
		"1.2.0.in-addr.arpa":       "",
		"9.1.2.0.192.in-addr.arpa": "",
		"a.2.0.192.in-addr.arpa":   "",
		"smolvm.example":           "",
		"":                         "",
	} {
		addr, ok := reversed(name)
		if ok != (want != "") || ok && addr.String() != want {
			t.Errorf("reversed(%q) = %s, %t, want %q", name, addr, ok, want)
		}
	}
}

func TestParseResolvConf(t *testing.T) {
	long := strings.Repeat("a.", 600) + "example"
	for _, test := range []struct {
		name, text      string
		servers, search []string
	}{
		{"nothing", "", []string{"127.0.0.1"}, nil},
		{"usual", "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch corp.example lab.example.\n",
			[]string{"192.0.2.1", "2001:db8::1"}, []string{"corp.example", "lab.example"}},
		{"too many", "nameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver 3.3.3.3\nnameserver 4.4.4.4\n",
			[]string{"1.1.1.1", "2.2.2.2", "3.3.3.3"}, nil},
		{"domain", "domain corp.example\n", []string{"127.0.0.1"}, []string{"corp.example"}},
		{"only the root", "search .\n", []string{"127.0.0.1"}, nil},
		{"not plain", "search a;b.example ok.example $(x)\n", []string{"127.0.0.1"}, []string{"ok.example"}},
		{"long", "search ok.example " + long + "\n", []string{"127.0.0.1"}, []string{"ok.example"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := parseResolvConf([]byte(test.text))
			if !slices.Equal(got.Servers, test.servers) || !slices.Equal(got.Search, test.search) {
				t.Errorf("servers %q, search %q; want %q, %q", got.Servers, got.Search, test.servers, test.search)
			}
		})
	}
}

func TestParseHosts(t *testing.T) {
	got := parseHosts([]byte("# comment\n192.0.2.1 One.Example one # two\n\n192.0.2.2\nbad three\nfe80::1%eth0 six\n::ffff:192.0.2.3 mapped\n"))
	for name, want := range map[string]string{
		"one.example": "[192.0.2.1]", "one": "[192.0.2.1]", "two": "[]", "three": "[]", "six": "[fe80::1]", "mapped": "[192.0.2.3]",
	} {
		if addrs := fmt.Sprint(got.addrs[name]); addrs != want {
			t.Errorf("%s is %s, want %s", name, addrs, want)
		}
	}
	if names := got.names[netip.MustParseAddr("192.0.2.1")]; !slices.Equal(names, []string{"one.example", "one"}) {
		t.Errorf("192.0.2.1 is %q", names)
	}
}
