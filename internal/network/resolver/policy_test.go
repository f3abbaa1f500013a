package resolver

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/dns"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

// answerWriter keeps the answer to a question.
type answerWriter struct {
	dns.ResponseWriter
	answer *dns.Msg
}

func (w *answerWriter) RemoteAddr() net.Addr { return &net.UDPAddr{} }

func (w *answerWriter) WriteMsg(answer *dns.Msg) error {
	w.answer = answer
	return nil
}

// A resolver tells what the policy that is in force at the moment allows, also of what the
// host's own files say, and whoever judges flows hears of no more than the guest.
func TestPolicy(t *testing.T) {
	dir := t.TempDir()
	files := Files{ResolvConf: filepath.Join(dir, "resolv.conf"), Hosts: filepath.Join(dir, "hosts")}
	if err := os.WriteFile(files.Hosts, []byte("203.0.113.1 good.example\n203.0.113.2 bad.example\n192.168.1.1 inside.example\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	byName := policytest.PolicyOf(t, network.DefaultDeny, "allow good.example", "allow inside.example")
	for _, test := range []struct {
		title  string
		policy *network.Policy // nil: the resolver knows of none
		name   string
		rcode  int
		told   bool
	}{
		{"no policy", nil, "bad.example.", dns.RcodeSuccess, true},
		{"a policy that allows all", &network.Policy{}, "bad.example.", dns.RcodeSuccess, true},
		{"a name that is allowed", &byName, "good.example.", dns.RcodeSuccess, true},
		{"a name that is not", &byName, "bad.example.", dns.RcodeNameError, false},
		{"an address that no name allows", &byName, "inside.example.", dns.RcodeSuccess, false},
		{"the guest itself", &byName, "localhost.", dns.RcodeSuccess, true},
	} {
		t.Run(test.title, func(t *testing.T) {
			heard := 0
			config := Config{Files: files, MayKnow: func(string, netip.Addr) bool { return true }}
			if test.policy != nil {
				config.Policy = func() *network.Policy { return test.policy }
				config.Told = func(_ string, answer []dns.RR) { heard += len(answer) }
			}
			r := New(config)
			defer func() { _ = r.Close() }()
			w := &answerWriter{}
			r.ServeDNS(w, new(dns.Msg).SetQuestion(test.name, dns.TypeA))
			if w.answer.Rcode != test.rcode || len(w.answer.Answer) == 1 != test.told {
				t.Errorf("the guest is told %s", w.answer)
			}
			if want := len(w.answer.Answer); test.policy != nil && test.name != "localhost." && heard != want {
				t.Errorf("%d addresses are noted, want %d", heard, want)
			}
		})
	}
}
