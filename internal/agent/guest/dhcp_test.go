package guest

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"reflect"
	"testing"
	"time"
)

var testMAC = net.HardwareAddr{2, 0, 172, 16, 0, 2}

// answer makes a message of a server.
func answer(id [4]byte, mac net.HardwareAddr, address string, options ...[]byte) []byte {
	m := make([]byte, dhcpFixed)
	m[0], m[1], m[2] = bootAck, 1, byte(len(mac))
	copy(m[4:], id[:])
	copy(m[16:], netip.MustParseAddr(address).AsSlice())
	copy(m[28:], mac)
	m = append(m, dhcpMagic...)
	for _, o := range options {
		m = append(m, o...)
	}
	return append(m, optEnd)
}

func seconds(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

func TestParseDHCP(t *testing.T) {
	id := [4]byte{1, 2, 3, 4}
	kind := func(k byte) []byte { return option(optType, []byte{k}) }
	server := option(optServer, []byte{192, 0, 2, 1})
	mask := option(optMask, []byte{255, 255, 255, 128})
	full := answer(id, testMAC, "192.0.2.77", kind(dhcpAck), server, mask, []byte{0, 0},
		option(optRouter, []byte{192, 0, 2, 1}), option(optDNS, []byte{192, 0, 2, 2, 192, 0, 2, 3, 192, 0, 2, 4, 192, 0, 2, 5}),
		option(optDomain, []byte("lab.example.\x00")), option(optMTU, []byte{5, 0xdc}), option(optLease, seconds(3600)))
	addrs := func(texts ...string) (all []netip.Addr) {
		for _, text := range texts {
			all = append(all, netip.MustParseAddr(text))
		}
		return all
	}
	least := dhcpLease{address: netip.MustParsePrefix("192.0.2.77/24"), server: netip.MustParseAddr("192.0.2.1"), duration: maxLease}
	with := func(change func(*dhcpLease)) *dhcpLease {
		lease := least
		change(&lease)
		return &lease
	}
	for name, test := range map[string]struct {
		message []byte
		kind    byte
		lease   *dhcpLease
	}{
		"full": {full, dhcpAck, &dhcpLease{
			address: netip.MustParsePrefix("192.0.2.77/25"), router: netip.MustParseAddr("192.0.2.1"),
			servers: addrs("192.0.2.2", "192.0.2.3", "192.0.2.4"), domain: "lab.example", mtu: 1500,
			server: netip.MustParseAddr("192.0.2.1"), duration: time.Hour,
		}},
		"least":                {answer(id, testMAC, "192.0.2.77", kind(dhcpOffer), server), dhcpOffer, &least},
		"a lease of a second":  {answer(id, testMAC, "192.0.2.77", kind(dhcpAck), server, option(optLease, seconds(1))), dhcpAck, with(func(l *dhcpLease) { l.duration = minLease })},
		"a domain with blanks": {answer(id, testMAC, "192.0.2.77", kind(dhcpAck), server, option(optDomain, []byte("a\nnameserver 6.6.6.6"))), dhcpAck, &least},
		"refusal":              {answer(id, testMAC, "0.0.0.0", kind(dhcpNak), server), dhcpNak, nil},
		"no server":            {answer(id, testMAC, "192.0.2.77", kind(dhcpAck)), dhcpAck, nil},
		"loopback":             {answer(id, testMAC, "127.0.0.1", kind(dhcpAck), server), dhcpAck, nil},
		"multicast":            {answer(id, testMAC, "224.0.0.1", kind(dhcpAck), server), dhcpAck, nil},
		"mask with a hole":     {answer(id, testMAC, "192.0.2.77", kind(dhcpAck), server, option(optMask, []byte{255, 0, 255, 0})), dhcpAck, nil},
		"another exchange":     {answer([4]byte{9}, testMAC, "192.0.2.77", kind(dhcpAck), server), 0, nil},
		"another guest":        {answer(id, net.HardwareAddr{2, 0, 0, 0, 0, 9}, "192.0.2.77", kind(dhcpAck), server), 0, nil},
		"cut":                  {full[:len(full)-3], 0, nil},
		"short":                {full[:dhcpFixed+3], 0, nil},
		"a question":           {append([]byte{bootRequest}, full[1:]...), 0, nil},
		"empty":                {nil, 0, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, lease := parseDHCP(test.message, id, testMAC)
			if got != test.kind || !reflect.DeepEqual(lease, test.lease) {
				t.Errorf("type %d, lease %+v, want %d, %+v", got, lease, test.kind, test.lease)
			}
		})
	}
}

// What the client sends is a packet of IPv4 to all, which its own reading takes for none of a
// server's.
func TestDHCPPacket(t *testing.T) {
	x := exchange{client: &dhcpClient{mac: testMAC}, id: [4]byte{1, 2, 3, 4}}
	packet := x.packet(dhcpDiscover, nil)
	if checksum(packet[:ipHeader]) != 0 || int(binary.BigEndian.Uint16(packet[2:])) != len(packet) {
		t.Errorf("header %x of %d bytes", packet[:ipHeader], len(packet))
	}
	if !bytes.Equal(packet[16:20], []byte{255, 255, 255, 255}) {
		t.Errorf("it goes to %v", packet[16:20])
	}
	if _, ok := dhcpPayload(packet); ok {
		t.Error("it is taken for an answer")
	}
	// As a server's, it is read.
	binary.BigEndian.PutUint16(packet[ipHeader:], serverPort)
	binary.BigEndian.PutUint16(packet[ipHeader+2:], ownPort)
	if message, ok := dhcpPayload(packet); !ok || message[0] != bootRequest {
		t.Errorf("%x, %v", message, ok)
	}
}

func FuzzDHCP(f *testing.F) {
	id := [4]byte{1, 2, 3, 4}
	f.Add(answer(id, testMAC, "192.0.2.77", option(optType, []byte{dhcpAck}), option(optServer, []byte{192, 0, 2, 1}), option(optDNS, make([]byte, 9))))
	f.Fuzz(func(t *testing.T, message []byte) {
		if _, lease := parseDHCP(message, id, testMAC); lease != nil {
			if !lease.address.IsValid() || lease.duration < minLease || lease.duration > maxLease || len(lease.servers) > maxServers {
				t.Errorf("%+v", lease)
			}
			if text := resolvConf(lease.servers, []string{lease.domain}); bytes.Count([]byte(text), []byte("\n")) > maxServers+1 {
				t.Errorf("resolv.conf: %q", text)
			}
		}
		_, _ = dhcpPayload(message)
	})
}
