package network

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

func TestParseRule(t *testing.T) {
	t.Parallel()
	prefix := netip.MustParsePrefix
	label := strings.Repeat("a", 63)
	for _, test := range []struct {
		text string
		want Rule
		as   string // how it is printed; empty: as it was
	}{
		{"allow *", Rule{Action: Allow}, ""},
		{"deny *:53/udp", Rule{Action: Deny, Ports: Ports{53, 53}, Protocol: smolvm.UDP}, ""},
		{"allow example.com:443/tcp", Rule{Action: Allow, Domain: "example.com", Ports: Ports{443, 443}, Protocol: smolvm.TCP}, ""},
		{"  allow\tExample.COM.  ", Rule{Action: Allow, Domain: "example.com"}, "allow example.com"},
		{"allow *.example.com:8000-8999", Rule{Action: Allow, Domain: "*.example.com", Ports: Ports{8000, 8999}}, ""},
		{"allow _dmarc.xn--bcher-kva.example", Rule{Action: Allow, Domain: "_dmarc.xn--bcher-kva.example"}, ""},
		{"allow intranet/tcp", Rule{Action: Allow, Domain: "intranet", Protocol: smolvm.TCP}, ""},
		{"allow " + label + ".example", Rule{Action: Allow, Domain: label + ".example"}, ""},
		{"allow 1.example", Rule{Action: Allow, Domain: "1.example"}, ""},
		{"allow 192.0.2.1", Rule{Action: Allow, CIDR: prefix("192.0.2.1/32")}, ""},
		{"allow 192.0.2.1/32", Rule{Action: Allow, CIDR: prefix("192.0.2.1/32")}, "allow 192.0.2.1"},
		{"allow 192.0.2.0/24:80/tcp", Rule{Action: Allow, CIDR: prefix("192.0.2.0/24"), Ports: Ports{80, 80}, Protocol: smolvm.TCP}, ""},
		{"deny 0.0.0.0/0", Rule{Action: Deny, CIDR: prefix("0.0.0.0/0")}, ""},
		{"deny 10.0.0.0/8/icmp", Rule{Action: Deny, CIDR: prefix("10.0.0.0/8"), Protocol: ICMP}, ""},
		{"deny [2001:db8::1]", Rule{Action: Deny, CIDR: prefix("2001:db8::1/128")}, ""},
		{"deny [2001:DB8::/32]:443/udp", Rule{Action: Deny, CIDR: prefix("2001:db8::/32"), Ports: Ports{443, 443}, Protocol: smolvm.UDP}, "deny [2001:db8::/32]:443/udp"},
		{"deny [::/0]/icmp", Rule{Action: Deny, CIDR: prefix("::/0"), Protocol: ICMP}, ""},
		{"allow @host:1-65535", Rule{Action: Allow, Place: PlaceHost, Ports: Ports{1, 65535}}, ""},
		{"deny @vms", Rule{Action: Deny, Place: PlaceVMs}, ""},
		{"allow *:80-80", Rule{Action: Allow, Ports: Ports{80, 80}}, "allow *:80"},
	} {
		got, err := ParseRule(test.text)
		if err != nil || got != test.want {
			t.Errorf("%q is %+v, %v; want %+v", test.text, got, err, test.want)
			continue
		}
		as := test.as
		if as == "" {
			as = test.text
		}
		if got.String() != as {
			t.Errorf("%q is printed as %q, want %q", test.text, got, as)
		}
	}
}

func TestParseRuleRefuses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":                                    `as in "allow example.com:443/tcp"`,
		"allow":                               "ACTION TARGET",
		"allow example.com 443":               "ACTION TARGET",
		"permit example.com":                  `"permit" is no action; use allow or deny`,
		"ALLOW example.com":                   "is no action",
		"allow example.com/sctp":              `"sctp" is no protocol; use tcp, udp or icmp`,
		"allow example.com/":                  `"" is no protocol`,
		"allow example.com/tcp/udp":           "neither an address, nor a network, nor a name",
		"allow example.com/24":                "neither an address, nor a network, nor a name",
		"allow example.com:":                  `"" is no port`,
		"allow example.com:0":                 "ports are 1 to 65535",
		"allow example.com:65536":             "ports are 1 to 65535",
		"allow example.com:-1":                "is no port",
		"allow example.com:+80":               "is no port",
		"allow example.com:http":              `"http" is no port`,
		"allow example.com:90-80":             "end before they begin",
		"allow example.com:80,443":            "is no port",
		"allow */icmp:8":                      "neither an address",
		"allow *:8/icmp":                      `ICMP has no ports; leave ":8" out`,
		"allow @moon":                         `"@moon" is no place; use @host or @vms`,
		"allow 300.1.1.1":                     "neither an address, nor a network, nor a name",
		"allow 1.2.3":                         "neither an address",
		"allow 010.0.0.1":                     "neither an address", // octal for some
		"allow 192.0.2.1/24":                  "write 192.0.2.0/24 for the network",
		"allow 192.0.2.0/33":                  "neither an address",
		"allow 2001:db8::1":                   "put an address of IPv6 in brackets",
		"allow 2001:db8::/32":                 "put an address of IPv6 in brackets",
		"allow [2001:db8::1":                  "the bracket is not closed",
		"allow [2001:db8::1]443":              `"443" follows the bracket`,
		"allow [192.0.2.1]:443":               "only these are in brackets",
		"allow [fe80::1%eth0]":                "has a zone",
		"allow [::ffff:192.0.2.1]":            "write it as IPv4",
		"allow [2001:db8::1/32]":              "write 2001:db8::/32",
		"allow .":                             "is no name",
		"allow *.":                            "write *.example.com",
		"allow *..":                           "is no name",
		"allow example..com":                  "empty label",
		"allow .example.com":                  "empty label",
		"allow example.com..":                 "empty label",
		"allow *.*.example.com":               "write *.example.com",
		"allow www.*.com":                     "write *.example.com",
		"allow *example.com":                  "write *.example.com",
		"allow **":                            "write *.example.com",
		"allow bücher.example":                "write it as DNS has it",
		"allow -a.example":                    "is no label of a name",
		"allow a-.example":                    "is no label of a name",
		"allow a\x00b.example":                `\x00`,
		"allow user@example.com":              "is no label of a name",
		"allow https://example.com":           "",
		"allow " + strings.Repeat("a", 64):    "more than 63 bytes",
		"allow " + strings.Repeat("a.", 127):  "", // at most 253 bytes: see the next
		"allow " + strings.Repeat("ab.", 100): "too long",
		"allow " + strings.Repeat("a", 5000):  "600 are allowed",
	} {
		got, err := ParseRule(text)
		if text == "allow "+strings.Repeat("a.", 127) { // 253 bytes, without the last dot
			if err != nil {
				t.Errorf("the longest name: %v", err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v; want %q in the error", text, got, err, want)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\x00\n") {
			t.Errorf("%q: the error has control characters: %q", text, err)
		}
	}
}

// What is read is printed so that it is read as the same again, and is safe to show.
func FuzzParseRule(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		rule, err := ParseRule(text)
		if err != nil {
			if rule != (Rule{}) {
				t.Errorf("%q is an error, %v, and %+v", text, err, rule)
			}
			return
		}
		printed := rule.String()
		again, err := ParseRule(printed)
		if err != nil || again != rule {
			t.Fatalf("%q is %+v, and its text %q is %+v, %v", text, rule, printed, again, err)
		}
		if marshalled, err := rule.MarshalText(); err != nil || string(marshalled) != printed {
			t.Errorf("%q is marshalled as %q, %v", printed, marshalled, err)
		}
		if strings.ContainsFunc(printed, func(c rune) bool { return c < ' ' || c > '~' }) {
			t.Errorf("%q has odd characters", printed)
		}
		p, nothing := Policy{Default: DefaultDeny, Rules: []Rule{rule}}, Policy{Default: DefaultDeny}
		if !p.Within(p) || !nothing.Within(p) || p.Within(nothing) != (rule.Action == Deny) {
			t.Errorf("%q is not compared as it is", printed)
		}
	})
}
