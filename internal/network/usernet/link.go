package usernet

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// socketBuffer holds a few hundred full frames, so that neither side waits for the
// other at each. The kernel may grant less; that is slower, not wrong: a socket that
// is full makes the sender wait, so no frame is lost on the link.
const socketBuffer = 1 << 20

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

// stallTime is how long a guest may take to accept a frame before the frame is lost.
// A guest that is paused takes none, and must not hold up the stack.
const stallTime = 100 * time.Millisecond

// guardedConn is the stack's end of the link: it drops the frames of the guest that the
// filter does not admit, and those to the guest that it does not take.
type guardedConn struct {
	net.Conn
	filter filter
}

func (c guardedConn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if err != nil || c.filter.admit(p[:n]) {
			return n, err
		}
	}
}

func (c guardedConn) Write(p []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(stallTime))
	n, err := c.Conn.Write(p)
	if err == nil || errors.Is(err, net.ErrClosed) {
		return n, err
	}
	return len(p), nil // lost, as happens to frames; after an error the stack would give the link up
}
