package stream

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxDatagram is the longest payload of UDP over IPv4, in bytes.
	maxDatagram = 65507
	// sessionIdle is how long a session without traffic lasts (RFC 4787, section 4.3: no less
	// than two minutes).
	sessionIdle = 2 * time.Minute
)

// Sessions counts the sessions of several forwards of datagrams, each of which costs this
// process a buffer of 64 KiB and what dial has made. When there would be more than Limit, the
// one of the same forward that has been idle for longest ends, or else the new one does not
// begin.
type Sessions struct {
	Limit int64
	count atomic.Int64
}

// Count returns how many there are.
func (s *Sessions) Count() int64 { return s.count.Load() }

// ForwardPackets takes the datagrams that come to a socket to what dial connects to, and the
// answers back. Each sender has a connection of its own, which lasts until nothing has passed
// for two minutes. Closing what is returned closes the socket and the connections, and returns
// when nothing of the forward runs any more.
func ForwardPackets(conn *net.UDPConn, sessions *Sessions, dial func() (net.Conn, error)) io.Closer {
	f := &packetForward{of: sessions, dial: dial, conn: conn, sessions: map[netip.AddrPort]*session{}}
	f.answerFromWhereAsked()
	f.running.Go(f.serve)
	return f
}

// packetForward is one UDP forward.
type packetForward struct {
	of      *Sessions
	dial    func() (net.Conn, error)
	conn    *net.UDPConn
	running sync.WaitGroup // the socket, and its sessions

	mu       sync.Mutex // guards the following
	closed   bool
	sessions map[netip.AddrPort]*session
}

// session is what one sender sends, and what is answered.
type session struct {
	peer  net.Conn
	to    netip.AddrPort
	last  atomic.Int64           // when something passed, in nanoseconds of the Unix time
	where atomic.Pointer[[]byte] // the control message that says at which address it was asked
	once  sync.Once
}

func (s *session) touch() { s.last.Store(time.Now().UnixNano()) }

func (s *session) close() { s.once.Do(func() { _ = s.peer.Close() }) }

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

// serve takes datagrams on until the socket is closed.
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
		if _, err := s.peer.Write(datagram[:size]); err != nil {
			// Most likely the peer has refused one before; that is told but once.
			_, _ = s.peer.Write(datagram[:size])
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
	for f.of.count.Add(1) > f.of.Limit {
		f.of.count.Add(-1)
		if !f.dropIdlest() {
			return nil
		}
	}
	peer, err := f.dial()
	if err != nil {
		f.of.count.Add(-1)
		return nil
	}
	s := &session{peer: peer, to: from}
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
		f.of.count.Add(-1)
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

// answer takes what the peer sends in a session to its sender, until the session is closed
// or has been idle.
func (f *packetForward) answer(s *session) {
	datagram := make([]byte, maxDatagram)
	for {
		idle := time.Since(time.Unix(0, s.last.Load()))
		if idle >= sessionIdle {
			return
		}
		_ = s.peer.SetReadDeadline(time.Now().Add(sessionIdle - idle))
		size, err := s.peer.Read(datagram)
		if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
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
	f.running.Wait()
	return err
}
