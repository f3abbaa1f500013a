package sniff

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/policytest"
)

// withExtensions makes a ClientHello with extensions, each of which is a kind and a body.
func withExtensions(extensions ...[]byte) []byte {
	all := bytes.Join(extensions, nil)
	body := append(make([]byte, 2+32), 0, 0, 2, 0x13, 0x01, 1, 0)
	body = append(binary.BigEndian.AppendUint16(body, uint16(len(all))), all...)
	message := append([]byte{clientHello, 0, byte(len(body) >> 8), byte(len(body))}, body...)
	return append([]byte{recordHandshake, 3, 1, byte(len(message) >> 8), byte(len(message))}, message...)
}

func extension(kind uint16, body ...byte) []byte {
	head := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, kind), uint16(len(body)))
	return append(head, body...)
}

func sni(name string) []byte {
	entry := append([]byte{nameTypeHost, 0, byte(len(name))}, name...)
	return extension(extensionSNI, append([]byte{0, byte(len(entry))}, entry...)...)
}

// inRecords splits a record's content into records of some size.
func inRecords(record []byte, size int) []byte {
	var all []byte
	for content := record[recordHeader:]; len(content) > 0; {
		part := content[:min(size, len(content))]
		all = append(append(all, record[0], record[1], record[2], byte(len(part)>>8), byte(len(part))), part...)
		content = content[len(part):]
	}
	return all
}

func TestFirst(t *testing.T) {
	t.Parallel()
	const end = "\r\n\r\n"
	grease := extension(0x1a1a, 0)
	concealed := network.Names{Hidden: true}
	good := sni("good.example")
	for _, test := range []struct {
		name, first string
		want        network.Names
	}{
		{"Go's hello", string(policytest.ClientHello(t, "good.example")), network.Names{SNI: "good.example"}},
		{"hello in records of a byte", string(inRecords(policytest.ClientHello(t, "good.example"), 1)), network.Names{SNI: "good.example"}},
		{"hello and what follows", string(policytest.ClientHello(t, "good.example")) + "\x14\x03\x03\x00\x01\x01", network.Names{SNI: "good.example"}},
		{"hello without SNI", string(policytest.ClientHello(t, "")), concealed},
		{"hello by an address", string(policytest.ClientHello(t, "192.0.2.1")), concealed},
		{"GREASE", string(withExtensions(grease, good, grease)), network.Names{SNI: "good.example"}},
		{"ECH", string(withExtensions(good, extension(extensionECH, 0))), concealed},
		{"ESNI", string(withExtensions(good, extension(extensionESNI, 0))), concealed},
		{"two SNIs", string(withExtensions(good, sni("bad.example"))), concealed},
		{"two names in one", string(withExtensions(extension(extensionSNI, 0, 8, 0, 0, 1, 'a', 0, 0, 1, 'b'))), concealed},
		{"name of another type", string(withExtensions(extension(extensionSNI, 0, 4, 1, 0, 1, 'a'))), concealed},
		{"empty name", string(withExtensions(sni(""))), concealed},
		{"name with a NUL", string(withExtensions(sni("good.example\x00"))), concealed},
		{"name that is escaped", string(withExtensions(sni(`x\.good.example`))), concealed},
		{"no extensions", string(withExtensions()), concealed},
		{"extension that is cut", string(withExtensions(good, []byte{0, 1, 0, 9})), concealed},
		{"handshake of another kind", "\x16\x03\x01\x00\x04\x02\x00\x00\x00", concealed},
		{"record without content", "\x16\x03\x01\x00\x00", concealed},
		{"record of another version", "\x16\x07\x01\x00\x04\x01\x00\x00\x00", concealed},
		{"alert in the middle", "\x16\x03\x01\x00\x01\x01\x15\x03\x01\x00\x02\x01\x00", concealed},
		{"hello that is too long", "\x16\x03\x01\x00\x04\x01\xff\xff\xff", concealed},
		{"hello of SSL 2", "\x80\x2e\x01\x03\x01\x00\x15\x00\x00", concealed},

		{"HTTP", "GET / HTTP/1.1\r\nHost: good.example" + end, network.Names{Host: "good.example"}},
		{"HTTP with a port", "POST /x HTTP/1.1\r\nAccept: *\r\nhOST:good.example:8080 " + end + "body", network.Names{Host: "good.example:8080"}},
		{"HTTP behind empty lines", "\r\n\r\nGET / HTTP/1.1\nHost: good.example\n\n", network.Names{Host: "good.example"}},
		{"HTTP without Host", "GET / HTTP/1.0" + end, network.Names{}},
		{"HTTP of before there was Host", "GET /\r\n", network.Names{}},
		{"two Hosts", "GET / HTTP/1.1\r\nHost: good.example\r\nHost: bad.example" + end, concealed},
		{"Host that goes on", "GET / HTTP/1.1\r\nHost: good.example\r\n .bad" + end, concealed},
		{"Host with a space", "GET / HTTP/1.1\r\nHost : good.example" + end, concealed},
		{"Host with a user", "GET / HTTP/1.1\r\nHost: good.example@bad.example" + end, concealed},
		{"Host that is empty", "GET / HTTP/1.1\r\nHost:" + end, concealed},
		{"proxy's target", "GET http://good.example/x HTTP/1.1\r\nHost: GOOD.example" + end, network.Names{Host: "GOOD.example"}},
		{"proxy's target of another", "GET http://bad.example/ HTTP/1.1\r\nHost: good.example" + end, concealed},
		{"proxy's target with a user", "GET http://good.example@bad.example/ HTTP/1.1" + end, concealed},
		{"proxy's target alone", "GET http://good.example HTTP/1.0" + end, network.Names{Host: "good.example"}},
		{"tunnel", "CONNECT good.example:443 HTTP/1.1" + end, network.Names{Host: "good.example:443"}},
		{"tunnel of another", "CONNECT bad.example:443 HTTP/1.1\r\nHost: good.example" + end, concealed},
		{"target that is none", "GET good.example HTTP/1.1\r\nHost: good.example" + end, concealed},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", concealed},
		{"HTTP with another space", "GET /a b HTTP/1.1\r\nHost: good.example" + end, concealed},

		{"SSH", "SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", network.Names{}},
		{"SMTP", "EHLO good.example\r\n", network.Names{}},
		{"Redis", "*1\r\n$4\r\nPING\r\n", network.Names{}},
		{"PostgreSQL", "\x00\x00\x00\x08\x04\xd2\x16\x2f", network.Names{}},
		{"garbage", "\xff\xfe\xfd", network.Names{}},
	} {
		got, done := First([]byte(test.first), false)
		if !done || got.SNI != test.want.SNI || got.Host != test.want.Host || got.Hidden != test.want.Hidden {
			t.Errorf("%s: %+v, done %t, want %+v", test.name, got, done, test.want)
		}
	}
}

// A name is not taken before all that may state another is there, and what comes slowly, or
// ends, hides it.
func TestFirstInParts(t *testing.T) {
	t.Parallel()
	for what, whole := range map[string][]byte{
		"TLS":   policytest.ClientHello(t, "good.example"),
		"SSL 2": []byte("\x80\x2e\x01\x03"),
		"HTTP":  []byte("GET / HTTP/1.1\r\nHost: good.example\r\nAccept: *\r\n\r\n"),
	} {
		for size := 1; size < len(whole); size++ {
			if got, done := First(whole[:size], false); done {
				t.Errorf("%s: %+v after %d of %d bytes", what, got, size, len(whole))
			}
			if got, done := First(whole[:size], true); !done || !got.Hidden {
				t.Errorf("%s that ends after %d bytes: %+v, done %t", what, size, got, done)
			}
		}
	}
	long := []byte("GET /" + strings.Repeat("x", Max))
	if got, done := First(long[:Max], false); !done || !got.Hidden {
		t.Errorf("a line without an end: %+v, done %t", got, done)
	}
	if got, done := First(nil, false); done {
		t.Errorf("nothing: %+v, done", got)
	}
	if got, done := First(nil, true); !done || got.Hidden {
		t.Errorf("nothing, and the end: %+v, done %t", got, done)
	}
}

func TestIsQUIC(t *testing.T) {
	t.Parallel()
	initial := append([]byte{0xc3, 0, 0, 0, 1}, make([]byte, 1195)...)
	for _, test := range []struct {
		datagram []byte
		want     bool
	}{{initial, true}, {initial[:1199], false}, {append([]byte{0x43}, initial[1:]...), false}, {nil, false}} {
		if got := IsQUIC(test.datagram); got != test.want {
			t.Errorf("%d bytes: %t, want %t", len(test.datagram), got, test.want)
		}
	}
}

// Whatever a guest sends, it has an answer, which does not depend on how it comes in parts:
// one that is given stays.
func FuzzFirst(f *testing.F) {
	f.Add(policytest.ClientHello(f, "good.example"), 7)
	f.Add(withExtensions(sni("a"), extension(extensionECH, 0)), 60)
	f.Add([]byte("GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n"), 20)
	f.Add([]byte("\x16\x03\x01\x00\x01\x01\x16"), 3)
	f.Fuzz(func(t *testing.T, first []byte, at int) {
		first = first[:min(len(first), Max)]
		whole, done := First(first, true)
		if !done {
			t.Fatal("no answer at the end")
		}
		if whole.Hidden && (whole.SNI != "" || whole.Host != "") || whole.SNI != "" && whole.Host != "" {
			t.Errorf("%+v", whole)
		}
		if at < 0 || at > len(first) || at == Max {
			return
		}
		part, done := First(first[:at], false)
		if done && (part.SNI != whole.SNI || part.Host != whole.Host || part.Hidden != whole.Hidden) {
			t.Errorf("%+v after %d bytes, and %+v after %d", part, at, whole, len(first))
		}
	})
}
