// Package stream has what is common to connections of all kinds: copying between two,
// accepting, looking ahead, and unix sockets whose path is too long for the kernel.
package stream

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// acceptPause is how long a listener rests after it could not accept.
const acceptPause = 50 * time.Millisecond

// Accept hands out the connections of a listener until it is closed, or ctx is done.
func Accept(ctx context.Context, listener net.Listener, handle func(net.Conn)) {
	for {
		conn, err := listener.Accept()
		if err == nil {
			handle(conn)
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// Out of files, most likely. Nothing tells when there are some again.
		select {
		case <-time.After(acceptPause):
		case <-ctx.Done():
			return
		}
	}
}

// Splice copies between two connections until both directions have ended, or ctx is
// done, then closes both. The end of one direction is passed on by closing the other
// connection for writing; that one was broken off, by breaking off the other: whoever
// reads from it must not take what came for all there was.
func Splice(ctx context.Context, a, b net.Conn) {
	closeBoth := func() { _, _ = a.Close(), b.Close() }
	defer context.AfterFunc(ctx, closeBoth)()
	defer closeBoth()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		both.Go(func() {
			_, err := io.Copy(way[0], way[1])
			half, ok := way[0].(interface{ CloseWrite() error })
			switch {
			case err != nil:
				abort(a)
				abort(b)
			case ok:
				_ = half.CloseWrite()
			default: // it can't be half closed: end the other direction as well
				closeBoth()
			}
		})
	}
	both.Wait()
}

// abort closes a connection so that its other end can tell that from a proper end, if that
// is possible with it.
func abort(conn net.Conn) {
	switch c := conn.(type) {
	case interface{ Abort() }:
		c.Abort()
		return
	case interface{ SetLinger(seconds int) error }:
		_ = c.SetLinger(0) // makes closing send a reset, see socket(7)
	}
	_ = conn.Close()
}

// IsBroken reports whether err is that of a connection whose other end is gone.
func IsBroken(err error) bool {
	for _, broken := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.EPIPE, syscall.ECONNRESET} {
		if errors.Is(err, broken) {
			return true
		}
	}
	return false
}

// Peeked is a connection of which some has been read ahead, into Reader.
type Peeked struct {
	net.Conn
	Reader *bufio.Reader
}

// Read implements [net.Conn].
func (c Peeked) Read(p []byte) (int, error) { return c.Reader.Read(p) }

// CloseWrite closes the connection for writing; one that can't be half closed, it closes.
func (c Peeked) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}
