package namespace_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The sizes of headers that a guest sends.
const (
	tcpOffset = header.EthernetMinimumSize + header.IPv4MinimumSize
	tcpHeader = header.TCPMinimumSize
	udpHeader = header.UDPMinimumSize
)

var (
	guestAddr = tcpip.AddrFrom4([4]byte{10, 0, 2, 15})
	otherAddr = tcpip.AddrFrom4([4]byte{10, 0, 2, 2})
)

// packet returns a frame of IPv4 with room for a payload of a protocol, and the sum of its
// pseudo-header, which is what a guest's kernel leaves in the place of the checksum.
func packet(protocol tcpip.TransportProtocolNumber, transport int, payload []byte) (frame []byte, pseudo uint16) {
	frame = ethernet("02:00:00:00:00:02", header.IPv4MinimumSize+transport+len(payload), 0)
	frame[12], frame[13] = 0x08, 0x00
	header.IPv4(frame[header.EthernetMinimumSize:]).Encode(&header.IPv4Fields{
		TotalLength: uint16(len(frame) - header.EthernetMinimumSize), TTL: 64, Protocol: uint8(protocol), SrcAddr: guestAddr, DstAddr: otherAddr,
	})
	ip := header.IPv4(frame[header.EthernetMinimumSize:])
	ip.SetChecksum(^ip.CalculateChecksum())
	copy(frame[tcpOffset+transport:], payload)
	return frame, header.PseudoHeaderChecksum(protocol, guestAddr, otherAddr, uint16(transport+len(payload)))
}

// virtioHeader says what is left to do for a frame; see virtio_net.h.
func virtioHeader(kind byte, headers, segment, start, offset int) []byte {
	const needsSum = 1
	h := []byte{needsSum, kind}
	for _, value := range []int{headers, segment, start, offset} {
		h = binary.LittleEndian.AppendUint16(h, uint16(value))
	}
	return h
}

// payload returns bytes that are not the same twice.
func payload(size int) []byte {
	random := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(random.Uint32())
	}
	return b
}

// checked returns the IPv4 packet of a frame whose checksums are right.
func checked(t *testing.T, frame []byte, mtu int) header.IPv4 {
	t.Helper()
	if len(frame) > mtu+header.EthernetMinimumSize {
		t.Fatalf("a frame has %d bytes, with an MTU of %d", len(frame), mtu)
	}
	ip := header.IPv4(frame[header.EthernetMinimumSize:])
	if !ip.IsValid(len(ip)) || !ip.IsChecksumValid() {
		t.Fatalf("no packet of IPv4: %x", frame[:min(len(frame), 60)])
	}
	return ip
}

// A guest sends segments of up to 64 KiB, and leaves checksums to its device. On the link are
// frames that anybody can read.
func TestOffloads(t *testing.T) {
	eachUser(t, func(t *testing.T) {
		const mtu = 1500
		g := startGuest(t, mtu)
		for _, size := range []int{1, 1460, 1461, 20000, 64000} {
			want := payload(size)
			frame, pseudo := packet(header.TCPProtocolNumber, tcpHeader, want)
			header.TCP(frame[tcpOffset:]).Encode(&header.TCPFields{
				SrcPort: 1, DstPort: 2, SeqNum: 1000, DataOffset: tcpHeader, Flags: header.TCPFlagAck | header.TCPFlagPsh, WindowSize: 65535, Checksum: pseudo,
			})
			kind := byte(unix.VIRTIO_NET_HDR_GSO_TCPV4)
			if size <= 1460 {
				kind = unix.VIRTIO_NET_HDR_GSO_NONE
			}
			g.offload(virtioHeader(kind, tcpOffset+tcpHeader, 1460, tcpOffset, 16), frame)
			var got []byte
			for len(got) < size {
				ip := checked(t, g.next(), mtu)
				tcp := header.TCP(ip.Payload())
				data := tcp.Payload()
				if !tcp.IsChecksumValid(guestAddr, otherAddr, checksum.Checksum(data, 0), uint16(len(data))) {
					t.Fatalf("of %d bytes: a checksum is wrong", size)
				}
				if at := int(tcp.SequenceNumber()) - 1000; at != len(got) {
					t.Fatalf("of %d bytes: %d come at %d", size, at, len(got))
				}
				got = append(got, data...)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("of %d bytes: others have arrived", size)
			}
		}
		want := payload(1400)
		frame, pseudo := packet(header.UDPProtocolNumber, udpHeader, want)
		header.UDP(frame[tcpOffset:]).Encode(&header.UDPFields{SrcPort: 1, DstPort: 2, Length: uint16(udpHeader + len(want)), Checksum: pseudo})
		g.offload(virtioHeader(unix.VIRTIO_NET_HDR_GSO_NONE, 0, 0, tcpOffset, 6), frame)
		udp := header.UDP(checked(t, g.next(), mtu).Payload())
		if !udp.IsChecksumValid(guestAddr, otherAddr, checksum.Checksum(udp.Payload(), 0)) || !bytes.Equal(udp.Payload(), want) {
			t.Error("the checksum or the content of a datagram is wrong")
		}
	})
}

// Neither side keeps the other waiting by taking nothing: frames are lost then, and others
// follow when there is room again, in their order.
func TestFull(t *testing.T) {
	eachUser(t, func(t *testing.T) {
		g := startGuest(t, 0)
		const frames = 2000 // more than the queue of an interface and a socket hold
		toLink := func(frame []byte) {
			if _, err := g.link.Write(frame); err != nil {
				t.Fatal(err)
			}
		}
		for _, way := range []struct {
			name string
			send func(frame []byte)
			next func() []byte
		}{{"from the guest", g.send, g.next}, {"to the guest", toLink, g.receive}} {
			for n := range frames {
				way.send(numbered(n))
			}
			received, last := 0, -1
			for last < frames {
				// Either this one finds room, or there are others to receive.
				way.send(numbered(frames))
				n := number(way.next())
				if n <= last {
					t.Fatalf("%s: frame %d follows frame %d", way.name, n, last)
				}
				received, last = received+1, n
			}
			t.Logf("%s: %d of %d frames have arrived", way.name, received, frames)
		}
	})
}

// numbered returns a frame with a number, and number that of such a frame.
func numbered(n int) []byte {
	frame := ethernet("02:00:00:00:00:02", 100, 0)
	binary.BigEndian.PutUint32(frame[header.EthernetMinimumSize:], uint32(n))
	return frame
}

func number(frame []byte) int {
	return int(binary.BigEndian.Uint32(frame[header.EthernetMinimumSize:]))
}
