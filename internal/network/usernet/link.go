package usernet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// socketBuffer holds a few hundred full frames, so that neither side waits for the
	// other at each. The kernel may grant less; that is slower, not wrong: a socket
	// that is full makes the sender wait, so no frame is lost on the link.
	socketBuffer = 1 << 20
	// stallTime is how long a guest may take to accept a frame before the frame is
	// lost. A guest that is paused takes none, and must not hold up the stack.
	stallTime = 100 * time.Millisecond
)

// newLink returns two connected datagram sockets, one for us and one for the VMM.
func newLink() (net.Conn, *os.File, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make network link: %w", err)
	}
	for _, end := range ends {
		_ = unix.SetsockoptInt(end, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
		_ = unix.SetsockoptInt(end, unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer)
	}
	ours, theirs := os.NewFile(uintptr(ends[0]), "link"), os.NewFile(uintptr(ends[1]), "link")
	conn, err := net.FileConn(ours) // duplicates it
	_ = ours.Close()
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make network link: %w", err), theirs.Close())
	}
	return conn, theirs, nil
}

// endpoint connects a stack to a link: each datagram is one Ethernet frame.
type endpoint struct {
	conn  net.Conn
	mtu   uint32
	mac   net.HardwareAddr
	admit func(frame []byte) bool // says which frames get into the stack
	pace  atomic.Pointer[pace]    // nil: there is no bound

	dispatcher atomic.Pointer[stack.NetworkDispatcher]

	received, sent atomic.Int64 // by the guest, in bytes
}

var _ stack.LinkEndpoint = (*endpoint)(nil)

// serve hands the frames of the link to the stack until the link is closed.
func (e *endpoint) serve() {
	frame := make([]byte, header.EthernetMinimumSize+int(e.mtu)+1) // a longer one is cut, and thus broken
	for {
		n, err := e.conn.Read(frame)
		if err != nil {
			return
		}
		e.sent.Add(int64(n))
		if p := e.pace.Load(); p != nil && p.fromGuest != nil {
			p.wait(p.fromGuest, n)
		}
		dispatcher := e.dispatcher.Load()
		if dispatcher == nil || !e.admit(frame[:n]) {
			continue
		}
		packet := stack.NewPacketBuffer(stack.PacketBufferOptions{
			Payload: buffer.MakeWithData(frame[header.EthernetMinimumSize:n]), // copies it
		})
		protocol := tcpip.NetworkProtocolNumber(binary.BigEndian.Uint16(frame[2*macLength:]))
		(*dispatcher).DeliverNetworkPacket(protocol, packet)
		packet.DecRef()
	}
}

// WritePackets implements [stack.LinkWriter]. A frame that the guest does not take is
// lost, as happens to frames; the protocols above are made for that.
func (e *endpoint) WritePackets(packets stack.PacketBufferList) (int, tcpip.Error) {
	p := e.pace.Load()
	for _, packet := range packets.AsSlice() {
		if p != nil && p.toGuest != nil {
			p.put(packet)
			continue
		}
		e.write(packet)
	}
	return packets.Len(), nil
}

func (e *endpoint) write(packet *stack.PacketBuffer) {
	frame := packet.ToView()
	_ = e.conn.SetWriteDeadline(time.Now().Add(stallTime))
	if _, err := e.conn.Write(frame.AsSlice()); err == nil {
		e.received.Add(int64(frame.Size()))
	}
	frame.Release()
}

// AddHeader implements [stack.NetworkLinkEndpoint].
func (e *endpoint) AddHeader(packet *stack.PacketBuffer) {
	header.Ethernet(packet.LinkHeader().Push(header.EthernetMinimumSize)).Encode(&header.EthernetFields{
		SrcAddr: packet.EgressRoute.LocalLinkAddress,
		DstAddr: packet.EgressRoute.RemoteLinkAddress,
		Type:    packet.NetworkProtocolNumber,
	})
}

// ParseHeader implements [stack.NetworkLinkEndpoint].
func (e *endpoint) ParseHeader(*stack.PacketBuffer) bool { return true }

// Attach implements [stack.NetworkLinkEndpoint].
func (e *endpoint) Attach(dispatcher stack.NetworkDispatcher) {
	if dispatcher == nil {
		e.dispatcher.Store(nil)
		return
	}
	e.dispatcher.Store(&dispatcher)
}

// IsAttached implements [stack.NetworkLinkEndpoint].
func (e *endpoint) IsAttached() bool { return e.dispatcher.Load() != nil }

// Capabilities implements [stack.NetworkLinkEndpoint]. A frame that has come over a
// local socket has not been damaged on the way.
func (e *endpoint) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
}

// MTU implements [stack.NetworkLinkEndpoint].
func (e *endpoint) MTU() uint32 { return e.mtu }

// SetMTU implements [stack.NetworkLinkEndpoint].
func (e *endpoint) SetMTU(uint32) {}

// MaxHeaderLength implements [stack.NetworkLinkEndpoint].
func (e *endpoint) MaxHeaderLength() uint16 { return header.EthernetMinimumSize }

// LinkAddress implements [stack.NetworkLinkEndpoint].
func (e *endpoint) LinkAddress() tcpip.LinkAddress { return tcpip.LinkAddress(e.mac) }

// SetLinkAddress implements [stack.NetworkLinkEndpoint].
func (e *endpoint) SetLinkAddress(tcpip.LinkAddress) {}

// ARPHardwareType implements [stack.NetworkLinkEndpoint].
func (e *endpoint) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }

// Wait implements [stack.NetworkLinkEndpoint]; serve is waited for elsewhere.
func (e *endpoint) Wait() {}

// Close implements [stack.NetworkLinkEndpoint].
func (e *endpoint) Close() {}

// SetOnCloseAction implements [stack.NetworkLinkEndpoint].
func (e *endpoint) SetOnCloseAction(func()) {}
