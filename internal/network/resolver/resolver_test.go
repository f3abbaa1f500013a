package resolver

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// Beyond the limit questions fail at once.
func TestLookupLimit(t *testing.T) {
	r := New(Config{Files: HostFiles(), MayKnow: func(string, netip.Addr) bool { return true }})
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

// A guest with IPv6 is told such addresses, and one without only that there is such a name.
func TestIPv6(t *testing.T) {
	t.Parallel()
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, []byte("2001:db8::1 both.example\n192.0.2.1 both.example\n192.0.2.2 four.example\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, ipv6 := range []bool{false, true} {
		r := New(Config{Files: Files{Hosts: hosts}, MayKnow: func(string, netip.Addr) bool { return true }, IPv6: ipv6})
		for name, want := range map[string]int{"both.example.": 1, "four.example.": 0} {
			if !ipv6 {
				want = 0
			}
			answer, err := r.answer(new(dns.Msg).SetQuestion(name, dns.TypeAAAA))
			if err != nil || answer.Rcode != dns.RcodeSuccess || len(answer.Answer) != want {
				t.Errorf("with IPv6 %t, %s is %v, %v", ipv6, name, answer, err)
			}
		}
		query := new(dns.Msg).SetQuestion("far.example.", dns.TypeAAAA)
		said := new(dns.Msg).SetReply(query)
		record, err := dns.NewRR("far.example. 5 IN AAAA 2001:db8::2")
		if err != nil {
			t.Fatal(err)
		}
		said.Answer = []dns.RR{record}
		if passed := r.passOn(query, said); (len(passed.Answer) == 1) != ipv6 {
			t.Errorf("with IPv6 %t, the answer of a name server becomes %v", ipv6, passed)
		}
		_ = r.Close()
	}
}
