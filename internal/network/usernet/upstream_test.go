package usernet

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm/internal/network/nettest"
	"github.com/smolvm/smolvm/internal/network/resolver"
)

// nameServer serves DNS at port 53 of an address, in the network of the test's own.
type nameServer struct{ asked atomic.Int32 }

func newNameServer(t *testing.T, addr string, answer func(query, reply *dns.Msg)) *nameServer {
	t.Helper()
	s := &nameServer{}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, query *dns.Msg) {
		s.asked.Add(1)
		reply := new(dns.Msg).SetReply(query)
		answer(query, reply)
		if _, overUDP := w.RemoteAddr().(*net.UDPAddr); overUDP {
			size := dns.MinMsgSize
			if options := query.IsEdns0(); options != nil {
				size = int(options.UDPSize())
			}
			if reply.Truncate(size); reply.Truncated {
				reply.Answer = nil
			}
		}
		_ = w.WriteMsg(reply)
	})
	at := net.JoinHostPort(addr, "53")
	packets, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	for _, server := range []*dns.Server{{PacketConn: packets, Handler: handler}, {Listener: listener, Handler: handler}} {
		started := make(chan struct{})
		server.NotifyStartedFunc = func() { close(started) }
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = server.ActivateAndServe()
		}()
		<-started
		t.Cleanup(func() {
			_ = server.Shutdown()
			<-done
		})
	}
	return s
}

func record(t testing.TB, text string) dns.RR {
	t.Helper()
	rr, err := dns.NewRR(text)
	if err != nil {
		t.Fatal(err)
	}
	return rr
}

// hostFiles makes other files of the host's, for a network to read.
func hostFiles(t *testing.T) resolver.Files {
	dir := t.TempDir()
	return resolver.Files{ResolvConf: filepath.Join(dir, "resolv.conf"), Hosts: filepath.Join(dir, "hosts")}
}

func writeHostFiles(t *testing.T, files resolver.Files, resolvConf, hosts string) {
	t.Helper()
	for path, text := range map[string]string{files.ResolvConf: resolvConf, files.Hosts: hosts} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// The guest is told what the name server says, whatever it asks (case 10).
func TestDNSSaysWhatUpstreamSays(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	zone := []string{
		"smolvm.example. 300 IN A 192.0.2.1",
		"smolvm.example. 200 IN AAAA 2001:db8::1",
		"smolvm.example. 100 IN AAAA 2001:db8::2",
		"smolvm.example. 300 IN SOA ns.example. me.example. 1 2 3 4 5",
		"smolvm.example. 300 IN CAA 0 issue \"ca.example\"",
		"smolvm.example. 300 IN HTTPS 1 . alpn=\"h2\"",
		"smolvm.example. 300 IN NAPTR 100 50 \"s\" \"http\" \"\" _http._tcp.smolvm.example.",
		"smolvm.example. 300 IN DS 1 8 2 0102030405060708091011121314151617181920212223242526272829303132",
		"smolvm.example. 300 IN TXT \"one\" \"two\"",
		"smolvm.example. 300 IN MX 10 mail.example.",
		"smolvm.example. 300 IN TYPE65400 \\# 2 abcd",
		"alias.example. 300 IN CNAME smolvm.example.",
		"_25._tcp.smolvm.example. 300 IN TLSA 3 1 1 0102",
		"a\\.b\\ c.example. 300 IN A 192.0.2.2",
		"1.2.0.192.in-addr.arpa. 300 IN PTR smolvm.example.",
		"rbl.example. 300 IN A 127.0.0.2",
		"myhost. 300 IN A 192.0.2.9",
	}
	soa := record(t, "example. 60 IN SOA ns.example. me.example. 1 2 3 4 60")
	newNameServer(t, "127.0.0.1", func(query, reply *dns.Msg) {
		question := query.Question[0]
		switch first, _, _ := strings.Cut(question.Name, "."); first {
		case "servfail":
			reply.Rcode = dns.RcodeServerFailure
			return
		case "refused":
			reply.Rcode = dns.RcodeRefused
			return
		case "other":
			reply.Question[0].Name = "another.example."
			return
		case "long":
			for i := range 60 {
				reply.Answer = append(reply.Answer, record(t, fmt.Sprintf("long.example. 5 IN TXT \"%03d%s\"", i, strings.Repeat("x", 100))))
			}
			return
		}
		found := false
		for _, text := range zone {
			rr := record(t, text)
			if !strings.EqualFold(rr.Header().Name, question.Name) {
				continue
			}
			found = true
			if rr.Header().Rrtype == question.Qtype || question.Qtype == dns.TypeANY || rr.Header().Rrtype == dns.TypeCNAME {
				reply.Answer = append(reply.Answer, rr)
			}
		}
		if !found {
			reply.Rcode = dns.RcodeNameError
		}
		if len(reply.Answer) == 0 {
			reply.Ns = []dns.RR{soa}
		}
	})
	files := hostFiles(t)
	n := newWithFiles(t, usualLimits(), files)
	writeHostFiles(t, files, "nameserver 127.0.0.1\noptions attempts:1\n", "127.0.1.1 myhost\n192.0.2.77 named.example named\n::1 six.example\n")
	g := newGuest(t, n)
	server := netip.AddrPortFrom(testConfig().Gateway, dnsPort)
	conn := packetConn{g.dialUDP(server)}
	for _, test := range []struct {
		name  string
		kind  uint16
		rcode int
		want  []string // begin with them
		soa   string   // of a negative answer: its owner and TTL
	}{
		{"smolvm.example.", dns.TypeA, dns.RcodeSuccess, []string{"smolvm.example. 300 IN A 192.0.2.1"}, ""},
		{"SmolVM.eXample.", dns.TypeA, dns.RcodeSuccess, []string{"smolvm.example. 300 IN A 192.0.2.1"}, ""},
		{"smolvm.example.", dns.TypeAAAA, dns.RcodeSuccess, nil, "smolvm.example. 100"},
		{"smolvm.example.", dns.TypeSOA, dns.RcodeSuccess, []string{zone[3]}, ""},
		{"smolvm.example.", dns.TypeCAA, dns.RcodeSuccess, []string{zone[4]}, ""},
		{"smolvm.example.", dns.TypeHTTPS, dns.RcodeSuccess, []string{"smolvm.example. 300 IN HTTPS 1 . alpn=\"h2\""}, ""},
		{"smolvm.example.", dns.TypeNAPTR, dns.RcodeSuccess, []string{"smolvm.example. 300 IN NAPTR 100 50"}, ""},
		{"smolvm.example.", dns.TypeDS, dns.RcodeSuccess, []string{"smolvm.example. 300 IN DS 1 8 2 0102"}, ""},
		{"smolvm.example.", dns.TypeTXT, dns.RcodeSuccess, []string{zone[8]}, ""},
		{"smolvm.example.", dns.TypeMX, dns.RcodeSuccess, []string{zone[9]}, ""},
		{"smolvm.example.", 65400, dns.RcodeSuccess, []string{zone[10]}, ""},
		{"_25._tcp.smolvm.example.", dns.TypeTLSA, dns.RcodeSuccess, []string{zone[12]}, ""},
		{"smolvm.example.", dns.TypeSRV, dns.RcodeSuccess, nil, "example. 60"},
		{"alias.example.", dns.TypeCNAME, dns.RcodeSuccess, []string{zone[11]}, ""},
		{"a\\.b\\ c.example.", dns.TypeA, dns.RcodeSuccess, []string{"a\\.b\\ c.example. 300 IN A 192.0.2.2"}, ""},
		{"1.2.0.192.in-addr.arpa.", dns.TypePTR, dns.RcodeSuccess, []string{zone[14]}, ""},
		{"rbl.example.", dns.TypeA, dns.RcodeSuccess, []string{zone[15]}, ""},
		{"nobody.example.", dns.TypeA, dns.RcodeNameError, nil, "example. 60"},
		{"nobody.example.", dns.TypeAAAA, dns.RcodeNameError, nil, "example. 60"},
		{"nobody.example.", dns.TypeTXT, dns.RcodeNameError, nil, "example. 60"},
		{"servfail.example.", dns.TypeSOA, dns.RcodeServerFailure, nil, ""},
		{"refused.example.", dns.TypeA, dns.RcodeRefused, nil, ""},
		{"other.example.", dns.TypeA, dns.RcodeServerFailure, nil, ""},
		{"smolvm.example.", dns.TypeAXFR, dns.RcodeNotImplemented, nil, ""},
		// Of the hosts file.
		{"named.example.", dns.TypeA, dns.RcodeSuccess, []string{"named.example. 0 IN A 192.0.2.77"}, ""},
		{"Named.", dns.TypeA, dns.RcodeSuccess, []string{"Named. 0 IN A 192.0.2.77"}, ""},
		{"named.example.", dns.TypeAAAA, dns.RcodeSuccess, nil, "named.example. 0"},
		{"77.2.0.192.in-addr.arpa.", dns.TypePTR, dns.RcodeSuccess, []string{
			"77.2.0.192.in-addr.arpa. 0 IN PTR named.", "77.2.0.192.in-addr.arpa. 0 IN PTR named.example."}, ""},
		{"myhost.", dns.TypeA, dns.RcodeSuccess, []string{"myhost. 300 IN A 192.0.2.9"}, ""}, // not the host's own 127.0.1.1
		{"six.example.", dns.TypeA, dns.RcodeNameError, nil, "example. 60"},
		{"sub.localhost.", dns.TypeMX, dns.RcodeSuccess, nil, "sub.localhost. 0"},
	} {
		answer := ask(t, conn, test.name, test.kind)
		what := test.name + " " + dns.Type(test.kind).String()
		if answer.Rcode != test.rcode || !answer.RecursionAvailable || answer.Question[0].Name != test.name {
			t.Errorf("%s: %s, want %s", what, answer, dns.RcodeToString[test.rcode])
		}
		var got []string
		for _, rr := range answer.Answer {
			got = append(got, strings.Join(strings.Fields(rr.String()), " "))
		}
		slices.Sort(got)
		matches := slices.EqualFunc(got, test.want, func(got, want string) bool {
			return strings.HasPrefix(strings.Replace(got, "CLASS1", "IN", 1), want)
		})
		if !matches {
			t.Errorf("%s is %q, want %q", what, got, test.want)
		}
		var negative string
		for _, rr := range answer.Ns {
			negative = fmt.Sprint(rr.Header().Name, " ", rr.Header().Ttl)
		}
		if negative != test.soa {
			t.Errorf("%s has the SOA %q, want %q", what, negative, test.soa)
		}
	}
	// All that there is, addresses of IPv6 too, is for who asks for all, or checks it.
	if answer := ask(t, conn, "smolvm.example.", dns.TypeANY); len(answer.Answer) < 10 && !answer.Truncated {
		t.Errorf("ANY: %s", answer)
	}
	query := new(dns.Msg).SetQuestion("smolvm.example.", dns.TypeAAAA)
	query.SetEdns0(4096, true)
	if answer := exchangeOn(t, conn, query); len(answer.Answer) != 2 || answer.IsEdns0() == nil {
		t.Errorf("AAAA with signatures: %s", answer)
	}
	// What is too long is cut for UDP, and whole over TCP and for who takes it.
	if answer := ask(t, conn, "long.example.", dns.TypeTXT); !answer.Truncated || len(answer.Answer) == 0 {
		t.Errorf("long answer over UDP: %d records, cut: %t", len(answer.Answer), answer.Truncated)
	}
	overTCP, err := g.dialTCP(server)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = overTCP.Close() }()
	if answer := ask(t, overTCP, "long.example.", dns.TypeTXT); len(answer.Answer) != 60 {
		t.Errorf("long answer over TCP: %d records", len(answer.Answer))
	}
	// Versions of EDNS that are not known.
	query = new(dns.Msg).SetQuestion("smolvm.example.", dns.TypeA)
	query.SetEdns0(4096, false)
	query.IsEdns0().SetVersion(1)
	if answer := exchangeOn(t, conn, query); answer.Rcode != dns.RcodeBadVers {
		t.Errorf("version 1 of EDNS: %s", answer)
	}
}

func exchangeOn(t *testing.T, conn net.Conn, query *dns.Msg) *dns.Msg {
	t.Helper()
	client := dns.Client{Timeout: patience}
	answer, _, err := client.ExchangeWithConn(query, &dns.Conn{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// One name server of several is enough, and which they are may change at any time.
func TestNameServers(t *testing.T) {
	if !nettest.InOwnNetworkWithIP(t) {
		return
	}
	answer := func(addr string) func(query, reply *dns.Msg) {
		return func(query, reply *dns.Msg) {
			reply.Answer = []dns.RR{record(t, query.Question[0].Name+" 5 IN A "+addr)}
		}
	}
	newNameServer(t, "127.0.0.2", answer("192.0.2.2"))
	newNameServer(t, "127.0.0.3", answer("192.0.2.3"))
	broken := newNameServer(t, "127.0.0.4", func(_, reply *dns.Msg) { reply.Rcode = dns.RcodeServerFailure })
	old := newNameServer(t, "127.0.0.5", func(query, reply *dns.Msg) {
		if query.IsEdns0() != nil {
			reply.Rcode = dns.RcodeFormatError
			return
		}
		answer("192.0.2.5")(query, reply)
	})
	silent, err := net.ListenPacket("udp", "127.0.0.6:53")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	files := hostFiles(t)
	n := newWithFiles(t, usualLimits(), files)
	conn := packetConn{newGuest(t, n).dialUDP(netip.AddrPortFrom(testConfig().Gateway, dnsPort))}
	for _, test := range []struct{ servers, want string }{
		{"127.0.0.2", "192.0.2.2"},
		{"127.0.0.3 127.0.0.2", "192.0.2.3"},
		{"127.0.0.4 127.0.0.2", "192.0.2.2"},
		{"127.0.0.5", "192.0.2.5"},
		{"127.0.0.7 127.0.0.3", "192.0.2.3"}, // where nothing listens
		{"127.0.0.6 127.0.0.3", "192.0.2.3"}, // which does not answer
		{"127.0.0.4", ""},
		{"127.0.0.7", ""},
		{"nonsense", ""},
	} {
		writeHostFiles(t, files, "nameserver "+strings.ReplaceAll(test.servers, " ", "\nnameserver ")+"\n", "")
		began := time.Now()
		got := ask(t, conn, "smolvm.example.", dns.TypeA)
		var addr string
		if len(got.Answer) == 1 {
			addr = got.Answer[0].(*dns.A).A.String()
		}
		if addr != test.want || (test.want == "") != (got.Rcode == dns.RcodeServerFailure) {
			t.Errorf("by %s it is %q (%s), want %q", test.servers, addr, dns.RcodeToString[got.Rcode], test.want)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("by %s it took %s", test.servers, took)
		}
	}
	if broken.asked.Load() == 0 || old.asked.Load() != 2 {
		t.Error("name servers were not asked")
	}
}
