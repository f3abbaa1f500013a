package learn

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// flow returns the record of a connection that was let through and has ended.
func flow(address string, change ...func(*smolvm.FlowRecord)) smolvm.FlowRecord {
	r := smolvm.FlowRecord{Kind: smolvm.FlowTCP, Event: smolvm.FlowClose, Address: address, Verdict: smolvm.FlowAllowed}
	for _, c := range change {
		c(&r)
	}
	return r
}

func asked(names ...string) func(*smolvm.FlowRecord) {
	return func(r *smolvm.FlowRecord) { r.AskedNames = names }
}

func sni(name string) func(*smolvm.FlowRecord) {
	return func(r *smolvm.FlowRecord) { r.SNI = name }
}

func udp(r *smolvm.FlowRecord)    { r.Kind = smolvm.FlowUDP }
func opened(r *smolvm.FlowRecord) { r.Event, r.Flow = smolvm.FlowOpen, 7 }
func denied(r *smolvm.FlowRecord) { r.Event = smolvm.FlowDeny }

func TestLearn(t *testing.T) {
	t.Parallel()
	hidden := func(r *smolvm.FlowRecord) { r.HiddenName = true }
	place := func(place string) func(*smolvm.FlowRecord) {
		return func(r *smolvm.FlowRecord) { r.Place = place }
	}
	closed := func(r *smolvm.FlowRecord) { r.Closed = "host" }
	for _, test := range []struct {
		name    string
		opts    smolvm.LearnOptions
		records []smolvm.FlowRecord
		want    string
		missed  int
	}{
		{name: "nothing"},
		{"a name", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("203.0.113.7:443", asked("example.com"), sni("example.com")), flow("203.0.113.8:443", asked("example.com"), sni("example.com")),
		}, "example.com:443/tcp", 0},
		{"an address", smolvm.LearnOptions{}, []smolvm.FlowRecord{flow("203.0.113.7:22"), flow("[2001:db8::1]:22")},
			"203.0.113.7:22/tcp [2001:db8::1]:22/tcp", 0},
		{"a forged name is worth an address", smolvm.LearnOptions{}, []smolvm.FlowRecord{flow("203.0.113.7:443", sni("example.com"))},
			"203.0.113.7:443/tcp", 0},
		{"the name that is stated, of several", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("203.0.113.7:443", asked("a.example", "b.example"), sni("b.example")),
		}, "b.example:443/tcp", 0},
		{"the name that serves most, of several", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("203.0.113.7:22", asked("a.example", "c.example")), flow("203.0.113.8:22", asked("b.example", "c.example")),
		}, "c.example:22/tcp", 0},
		{"a name that is needed anyway", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("203.0.113.7:22", asked("b.example")), flow("203.0.113.8:22", asked("a.example", "b.example")),
		}, "b.example:22/tcp", 0},
		{"a private address", smolvm.LearnOptions{}, []smolvm.FlowRecord{flow("192.168.1.9:443", asked("nas.example"), sni("nas.example"))},
			"192.168.1.9:443/tcp", 0},
		{"QUIC", smolvm.LearnOptions{}, []smolvm.FlowRecord{flow("203.0.113.7:443", udp, asked("example.com"), hidden)}, "203.0.113.7:443/udp", 0},
		{"ports and protocols", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("203.0.113.7:8001"), flow("203.0.113.7:8000"), flow("203.0.113.7:9000"), flow("203.0.113.7:9000", udp),
		}, "203.0.113.7:8000-8001/tcp 203.0.113.7:9000", 0},
		{"a name server", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("9.9.9.9:53", udp), flow("9.9.9.9:54", udp), flow("9.9.9.9:853"), flow("9.9.9.9:443"),
		}, "9.9.9.9:53/udp 9.9.9.9:54/udp 9.9.9.9:443/tcp 9.9.9.9:853/tcp", 0},
		{"the host, VMs and metadata", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("192.168.1.1:5432", place("host")), flow("172.16.0.9:80", place("vms")), flow("169.254.169.254:80"),
		}, "@host:5432/tcp @vms:80/tcp 169.254.169.254:80/tcp", 0},
		{"what no rule opens", smolvm.LearnOptions{}, []smolvm.FlowRecord{flow("127.0.0.1:80")}, "", 1},
		{"one that is open still", smolvm.LearnOptions{}, []smolvm.FlowRecord{flow("203.0.113.7:22", opened)}, "203.0.113.7:22/tcp", 0},
		{"one whose name comes later", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("203.0.113.7:443", opened, asked("a.example", "b.example")),
			flow("203.0.113.7:443", asked("a.example", "b.example"), sni("b.example"), func(r *smolvm.FlowRecord) { r.Flow = 7 }),
		}, "b.example:443/tcp", 0},
		{"one that was open when the shim died", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("203.0.113.7:22", opened), {Kind: smolvm.FlowStart}, flow("203.0.113.8:22", opened),
		}, "203.0.113.7:22/tcp 203.0.113.8:22/tcp", 0},
		{"what was denied", smolvm.LearnOptions{}, []smolvm.FlowRecord{flow("203.0.113.7:22", denied)}, "", 0},
		{"what was denied, on demand", smolvm.LearnOptions{Denied: true}, []smolvm.FlowRecord{
			flow("203.0.113.7:22", denied), flow("192.168.1.1:22", denied, closed),
		}, "203.0.113.7:22/tcp", 0},
		{"many names", smolvm.LearnOptions{}, []smolvm.FlowRecord{
			flow("203.0.113.7:443", asked("a.example.co.uk")), flow("203.0.113.8:443", asked("b.example.co.uk")),
		}, "a.example.co.uk:443/tcp b.example.co.uk:443/tcp", 0},
		{"wildcards", smolvm.LearnOptions{Wildcards: true}, []smolvm.FlowRecord{
			flow("203.0.113.7:443", asked("a.example.co.uk")), flow("203.0.113.8:443", asked("b.c.example.co.uk")),
			flow("203.0.113.9:443", asked("example.co.uk")), flow("203.0.113.10:443", asked("other.co.uk")),
			flow("203.0.113.11:443", asked("x.alone.org")), flow("203.0.113.12:80", asked("y.alone.org")),
		}, "*.example.co.uk:443/tcp example.co.uk:443/tcp other.co.uk:443/tcp x.alone.org:443/tcp y.alone.org:80/tcp", 0},
		{"hostile names", smolvm.LearnOptions{Wildcards: true}, []smolvm.FlowRecord{
			flow("203.0.113.7:443", asked("*"), sni("*")), flow("203.0.113.7:444", asked("@host"), sni("@host")),
			flow("203.0.113.7:445", asked("a b;rm"), sni("a b;rm")), flow("203.0.113.7:446", asked("10.0.0.0/8"), sni("10.0.0.0/8")),
			flow("203.0.113.7:447", asked("*.com"), sni("*.com")), flow("hello"),
		}, "203.0.113.7:443-447/tcp", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := New(test.opts)
			for _, r := range test.records {
				l.Add(r)
			}
			learned := l.Policy()
			want := strings.Fields(test.want)
			for i := range want {
				want[i] = "allow " + want[i]
			}
			if !slices.Equal(learned.Policy.Rules, want) || len(learned.Uncovered) != test.missed {
				t.Errorf("learned %q, and not %q; want %q", learned.Policy.Rules, learned.Uncovered, want)
			}
			// What was learned allows what was seen.
			policy, err := network.PolicyOf(learned.Policy)
			if err != nil {
				t.Fatal(err)
			}
			allowed := 0
			for _, f := range l.flows {
				if policy.Verdict(f).Allowed {
					allowed++
				}
			}
			if allowed != len(l.flows)-test.missed || learned.Flows != len(l.flows) {
				t.Errorf("the policy allows %d of %d flows", allowed, len(l.flows))
			}
		})
	}
}

// A policy that is learned has no more rules than one may have, and says so.
func TestLearnTooMuch(t *testing.T) {
	t.Parallel()
	l := New(smolvm.LearnOptions{})
	for i := range 2 * network.MaxRules {
		l.Add(flow(fmt.Sprintf("203.0.%d.%d:22", i>>8, i&0xff)))
	}
	learned := l.Policy()
	if _, err := network.PolicyOf(learned.Policy); err != nil || len(learned.Policy.Rules) != network.MaxRules || len(learned.Uncovered) != 1 {
		t.Errorf("learned %d rules, %v; left out: %q", len(learned.Policy.Rules), err, learned.Uncovered)
	}
}
