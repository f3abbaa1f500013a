package network

import (
	"errors"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

func TestPolicyOf(t *testing.T) {
	t.Parallel()
	p, err := PolicyOf(smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow example.com:443/tcp", "deny *"}})
	if err != nil || p.Default != DefaultDeny || len(p.Rules) != 2 || p.Rules[0].Domain != "example.com" {
		t.Errorf("%+v, %v", p, err)
	}
	for _, test := range []struct {
		public smolvm.EgressPolicy
		want   []string // fields
	}{
		{smolvm.EgressPolicy{Default: "open"}, []string{"egress.default"}},
		{smolvm.EgressPolicy{Rules: []string{"allow *", "allow", "deny a..b", "deny bücher.example"}},
			[]string{"egress.rules[1]", "egress.rules[2]", "egress.rules[3]"}},
		{smolvm.EgressPolicy{Rules: make([]string, MaxRules+1)}, []string{"egress.rules"}},
	} {
		_, err := PolicyOf(test.public)
		var wrong *smolvm.ValidationError
		if !errors.As(err, &wrong) {
			t.Errorf("%.60v: %v", test.public, err)
			continue
		}
		var fields []string
		for _, f := range wrong.Fields {
			fields = append(fields, f.Field)
		}
		if strings.Join(fields, " ") != strings.Join(test.want, " ") {
			t.Errorf("%.60v: %q, want %q", test.public, fields, test.want)
		}
	}
	// The words are the same in both.
	for public, own := range map[smolvm.EgressDefault]Default{
		smolvm.EgressAllow: DefaultAllow, smolvm.EgressDeny: DefaultDeny, smolvm.EgressDNSOnly: DefaultDNSOnly,
	} {
		if string(public) != string(own) {
			t.Errorf("%s is %s", public, own)
		}
	}
}

func TestDestination(t *testing.T) {
	t.Parallel()
	p := policyOf(t, DefaultDeny, "allow good.example:443/tcp", "allow 192.168.0.0/16:80", "allow *.good.example")
	for _, test := range []struct {
		text    string
		allowed bool
		by      int
		why     string
	}{
		{"good.example", true, 1, "if the name leads to a public address"},
		{"good.example:443", true, 1, ""},
		{"GOOD.example.:443/tcp", true, 1, ""},
		{"good.example:443/udp", false, 0, "QUIC"},
		{"good.example:80", false, 0, "by default"},
		{"https://user@good.example/path?q=/", true, 1, ""},
		{"http://good.example", false, 0, ""},
		{"https://good.example:8443/", false, 0, ""},
		{"good.example=192.168.1.1:443", false, 0, "denied by default"},
		{"good.example=203.0.113.1:443", true, 1, ""},
		{"www.good.example=192.168.1.1:80", true, 2, ""},
		{"bad.example:443", false, 0, "the name is not resolved"},
		{"192.168.1.1:80", true, 2, ""},
		{"192.168.1.1/icmp", false, 0, ""},
		{"2001:db8::1", false, 0, ""},
		{"[2001:db8::1]:443", false, 0, ""},
		{"169.254.169.254:80", false, 0, "metadata"},
	} {
		d, err := ParseDestination(test.text)
		if err != nil {
			t.Error(err)
			continue
		}
		got, why := p.Test(d)
		if got.Allowed != test.allowed || got.Number != test.by || !strings.Contains(why, test.why) {
			t.Errorf("%s: %+v, %q; want allowed %t by rule %d, %q", test.text, got, why, test.allowed, test.by, test.why)
		}
	}
	for _, text := range []string{
		"", " ", "*", "*.example.com", "a b", "a..b", "example.com:0", "example.com:80-90", "192.0.2.0/24", "@host",
		"ftp://example.com/", "https://", "a=b", "=192.0.2.1", "*=192.0.2.1", "a:1=192.0.2.1", "fe80::1%eth0", strings.Repeat("a", 1000),
	} {
		if d, err := ParseDestination(text); err == nil {
			t.Errorf("%q is read as %+v", text, d)
		}
	}
}

func FuzzParseDestination(f *testing.F) {
	for _, text := range []string{"example.com:443/tcp", "https://a@b:1/", "a=[2001:db8::1]:53/udp", "2001:db8::1"} {
		f.Add(text)
	}
	p := policyOf(f, DefaultDeny, "allow *.example.com", "allow 192.0.2.0/24")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseDestination(text)
		if err != nil {
			return
		}
		if d.Name == "" && !d.Flow.To.Addr().IsValid() {
			t.Fatalf("%q is nothing: %+v", text, d)
		}
		if v, why := p.Test(d); why == "" || v.Allowed && v.Number == 0 {
			t.Errorf("%q: %+v, %q", text, v, why)
		}
	})
}
