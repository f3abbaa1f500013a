package vmmtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/vmm"
)

// Addresses of the network test; see RFC 5737.
const (
	guestMAC = "02:00:00:00:00:02"
	hostMAC  = "02:00:00:00:00:01"
	guestIP  = "192.0.2.2"
	hostIP   = "192.0.2.1"
)

// network: frames get through in both directions: the guest pings an address; the
// host answers its question for that address, and then gets the ping.
func network(k *kit) {
	if k.assets.SkipLink != "" {
		k.Skip(k.assets.SkipLink)
	}
	link, theirs := linkPair(k)
	g := k.boot(func(c *vmm.Config) {
		c.NIC = &vmm.NIC{MAC: guestMAC, MTU: 1400, Link: theirs}
	})
	// Start has duplicated it, so the caller's copy does not keep it open.
	if err := theirs.Close(); err != nil {
		k.Errorf("close the link: %v", err)
	}
	if got, want := g.run("cat /sys/class/net/eth0/mtu"), k.mtu(); got != want {
		k.Errorf("the guest's MTU is %s, want %s", got, want)
	}
	if got := g.run("cat /sys/class/net/eth0/address"); got != guestMAC {
		k.Errorf("the guest's MAC is %s, want %s", got, guestMAC)
	}
	g.run("ip link set eth0 up && ip addr add " + guestIP + "/24 dev eth0")
	g.tell("ping -c 60 -q " + hostIP)

	if err := link.SetReadDeadline(time.Now().Add(patience)); err != nil {
		k.Fatal(err)
	}
	frame := make([]byte, 2048)
	for {
		n, err := link.Read(frame)
		if err != nil {
			k.Fatalf("wait for the guest's frames: %v", err)
		}
		switch got := frame[:n]; {
		case isARPRequest(got):
			if _, err := link.Write(arpReply()); err != nil {
				k.Fatal(err)
			}
		case isPing(got):
			return
		}
	}
}

// mtu is what the guest's interface has if it was given one of 1400.
func (k *kit) mtu() string {
	if k.assets.NoMTU {
		return "1500"
	}
	return "1400"
}

// linkPair returns the host's end of a link, and the VMM's.
func linkPair(k *kit) (net.Conn, *os.File) {
	k.Helper()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		k.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(ends[0]), "link"), os.NewFile(uintptr(ends[1]), "link")
	conn, err := net.FileConn(ours)
	if err := errors.Join(err, ours.Close()); err != nil {
		k.Fatal(err)
	}
	k.Cleanup(func() { _ = conn.Close() })
	return conn, theirs
}

const (
	etherTypeIPv4 = 0x0800
	etherTypeARP  = 0x0806
	headerLength  = 14
)

func etherType(frame []byte) uint16 {
	if len(frame) < headerLength {
		return 0
	}
	return binary.BigEndian.Uint16(frame[12:])
}

func mac(text string) net.HardwareAddr {
	address, err := net.ParseMAC(text)
	if err != nil {
		panic(err) // the constants above are wrong
	}
	return address
}

func ip(text string) net.IP { return net.ParseIP(text).To4() }

// isARPRequest reports whether the guest asks for the host's address; see RFC 826.
func isARPRequest(frame []byte) bool {
	const request, length = 1, 28
	if etherType(frame) != etherTypeARP || len(frame) < headerLength+length {
		return false
	}
	arp := frame[headerLength:]
	return bytes.Equal(frame[6:12], mac(guestMAC)) &&
		binary.BigEndian.Uint16(arp[6:]) == request &&
		bytes.Equal(arp[24:28], ip(hostIP))
}

// arpReply tells the guest the host's address.
func arpReply() []byte {
	header := append(append(mac(guestMAC), mac(hostMAC)...), 0x08, 0x06)
	// Ethernet, IPv4, lengths of their addresses, a reply.
	arp := []byte{0, 1, 0x08, 0x00, 6, 4, 0, 2}
	for _, part := range [][]byte{mac(hostMAC), ip(hostIP), mac(guestMAC), ip(guestIP)} {
		arp = append(arp, part...)
	}
	return append(header, arp...)
}

// isPing reports whether the frame is an echo request to the host.
func isPing(frame []byte) bool {
	const icmp, echoRequest, ipLength = 1, 8, 20
	if etherType(frame) != etherTypeIPv4 || len(frame) <= headerLength+ipLength {
		return false
	}
	packet := frame[headerLength:]
	return packet[9] == icmp && packet[ipLength] == echoRequest &&
		bytes.Equal(frame[:6], mac(hostMAC)) && bytes.Equal(packet[16:20], ip(hostIP))
}
