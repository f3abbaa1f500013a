package usernet

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// maxSessions bounds the sessions of all UDP forwards, each of which costs this process a
// buffer of maxDatagram and what the guest has answered. When there are more, the one of
// the same forward that has been idle for longest ends, or else the new one does not begin.
const maxSessions = 256

// ForwardPackets takes the datagrams that come to a socket to a UDP port of the guest, and
// the guest's answers back. Each sender has a session of its own, which lasts until nothing
// has passed for two minutes. Closing what is returned closes the socket and its sessions.
func (n *Network) ForwardPackets(conn *net.UDPConn, guestPort int) io.Closer {
	f := &packetForward{network: n, conn: conn, guestPort: uint16(guestPort), sessions: map[netip.AddrPort]*session{}}
	f.answerFromWhereAsked()
	f.running.Go(f.serve)
	if !n.track(f) {
		_ = f.Close()
	}
	return f
}

// packetForward is one UDP forward.
type packetForward struct {
	network   *Network
	conn      *net.UDPConn
	guestPort uint16
	running   sync.WaitGroup // the socket, and its sessions

	mu       sync.Mutex // guards the following
	closed   bool
	sessions map[netip.AddrPort]*session
}

// session is what one sender sends, and what the guest answers.
type session struct {
	guest *gonet.UDPConn
	to    netip.AddrPort
	last  atomic.Int64           // when something passed, in nanoseconds of the Unix time
	where atomic.Pointer[[]byte] // the control message that says at which address it was asked
	once  sync.Once
}

func (s *session) touch() { s.last.Store(time.Now().UnixNano()) }

func (s *session) close() { s.once.Do(func() { _ = s.guest.Close() }) }

// answerFromWhereAsked has the kernel tell at which of the host's addresses a datagram came
// in. The sender takes answers from no other; see ip(7) and ipv6(7).
func (f *packetForward) answerFromWhereAsked() {
	raw, err := f.conn.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	})
}

// serve takes datagrams to the guest until the socket is closed.
func (f *packetForward) serve() {
	datagram := make([]byte, maxDatagram)
	control := make([]byte, unix.CmsgSpace(unix.SizeofInet6Pktinfo)+unix.CmsgSpace(unix.SizeofInet4Pktinfo))
	for {
		size, controlSize, _, from, err := f.conn.ReadMsgUDPAddrPort(datagram, control)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of a datagram that was sent before
		}
		s := f.session(from)
		if s == nil {
			continue // lost, as happens to datagrams
		}
		where := answerControl(control[:controlSize])
		s.where.Store(&where)
		s.touch()
		if _, err := s.guest.Write(datagram[:size]); err != nil {
			// Most likely the guest has refused one before; that is told but once.
			_, _ = s.guest.Write(datagram[:size])
		}
	}
}

// answerControl makes of the control message of a datagram that of its answers: from the
// same address, by whatever interface. It is nil if the socket has but one address.
func answerControl(received []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(received)
	if err != nil {
		return nil
	}
	for _, message := range messages {
		switch {
		case message.Header.Level == unix.IPPROTO_IP && message.Header.Type == unix.IP_PKTINFO && len(message.Data) >= unix.SizeofInet4Pktinfo:
			info := unix.Inet4Pktinfo{Spec_dst: [4]byte(message.Data[4:8])}
			return unix.PktInfo4(&info)
		case message.Header.Level == unix.IPPROTO_IPV6 && message.Header.Type == unix.IPV6_PKTINFO && len(message.Data) >= unix.SizeofInet6Pktinfo:
			info := unix.Inet6Pktinfo{Addr: [16]byte(message.Data[:16])}
			if ip := netip.AddrFrom16(info.Addr); ip.IsLinkLocalUnicast() {
				return nil // it means nothing without the interface, and the kernel finds it
			}
			return unix.PktInfo6(&info)
		}
	}
	return nil
}

// session finds the session of a sender, or begins one; nil if there can be none.
func (f *packetForward) session(from netip.AddrPort) *session {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, ok := f.sessions[from]; ok || f.closed {
		return s
	}
	for f.network.sessions.Add(1) > maxSessions {
		f.network.sessions.Add(-1)
		if !f.dropIdlest() {
			return nil
		}
	}
	address := tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFrom4(f.network.config.Guest.As4()), Port: f.guestPort}
	guest, err := gonet.DialUDP(f.network.stack, nil, &address, ipv4.ProtocolNumber)
	if err != nil {
		f.network.sessions.Add(-1)
		return nil
	}
	s := &session{guest: guest, to: from}
	s.touch()
	f.sessions[from] = s
	f.running.Go(func() {
		f.answer(s)
		s.close()
		f.mu.Lock()
		defer f.mu.Unlock()
		f.forget(s)
	})
	return s
}

// forget takes a session out of the books; f.mu is held. It may have been already.
func (f *packetForward) forget(s *session) {
	if f.sessions[s.to] == s {
		delete(f.sessions, s.to)
		f.network.sessions.Add(-1)
	}
}

// dropIdlest ends the session that has been idle for longest, if there is any; f.mu is held.
func (f *packetForward) dropIdlest() bool {
	var idlest *session
	for _, s := range f.sessions {
		if idlest == nil || s.last.Load() < idlest.last.Load() {
			idlest = s
		}
	}
	if idlest == nil {
		return false
	}
	idlest.close()
	f.forget(idlest)
	return true
}

// answer takes what the guest sends in a session to its sender, until the session is closed
// or has been idle.
func (f *packetForward) answer(s *session) {
	datagram := make([]byte, maxDatagram)
	for {
		idle := time.Since(time.Unix(0, s.last.Load()))
		if idle >= flowIdle {
			return
		}
		_ = s.guest.SetReadDeadline(time.Now().Add(flowIdle - idle))
		size, err := s.guest.Read(datagram)
		if isTimeout(err) {
			continue // the sender may have been busy
		}
		if err != nil {
			return
		}
		s.touch()
		var where []byte
		if p := s.where.Load(); p != nil {
			where = *p
		}
		_, _, _ = f.conn.WriteMsgUDPAddrPort(datagram[:size], where, s.to)
	}
}

// Close implements [io.Closer]. It returns when nothing of the forward runs any more.
func (f *packetForward) Close() error {
	f.mu.Lock()
	f.closed = true
	for _, s := range f.sessions {
		s.close()
	}
	f.mu.Unlock()
	err := f.conn.Close()
	f.network.untrack(f)
	f.running.Wait()
	return err
}
