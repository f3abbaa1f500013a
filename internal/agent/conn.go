package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// Dial connects to an address as the guest sees it: "tcp" or "unix". The connection has
// deadlines, and CloseWrite.
func (c *Client) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	kind, payload, err := dialRequest(network, address)
	if err != nil {
		return nil, err
	}
	call, err := c.open(ctx, kind, payload)
	if err != nil {
		return nil, err
	}
	return newConn(call, guestAddr{network, address}), nil
}

// dialRequest returns the request of a channel to an address; see RFC 4254, section 7.2, and
// OpenSSH's PROTOCOL, section 2.4.
func dialRequest(network, address string) (kind string, payload []byte, err error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
		host, portText, err := net.SplitHostPort(address)
		if err != nil {
			return "", nil, err
		}
		port, err := strconv.ParseUint(portText, 10, 16)
		if err != nil {
			return "", nil, fmt.Errorf("port %q is not a number from 0 to 65535", portText)
		}
		return "direct-tcpip", ssh.Marshal(struct {
			Host       string
			Port       uint32
			OriginHost string
			OriginPort uint32
		}{host, uint32(port), "0.0.0.0", 0}), nil
	case "unix":
		return "direct-streamlocal@openssh.com", ssh.Marshal(struct {
			Path     string
			Reserved string
			Unused   uint32
		}{Path: address}), nil
	}
	return "", nil, net.UnknownNetworkError(network)
}

// conn is an SSH channel as a connection with deadlines, which SSH's channels have not.
// Between its user and the channel there is a pipe for each direction, which has them,
// and a goroutine that copies.
type conn struct {
	call        *call
	addr        guestAddr
	read, write net.Conn
	closed      atomic.Bool
	flushed     chan struct{} // closed when what was written has been sent
}

// guestAddr is an address as the guest sees it.
type guestAddr struct{ network, address string }

func (a guestAddr) Network() string { return a.network }
func (a guestAddr) String() string  { return a.address }

func newConn(call *call, addr guestAddr) *conn {
	c := &conn{call: call, addr: addr, flushed: make(chan struct{})}
	var in, out net.Conn
	c.read, in = net.Pipe()
	c.write, out = net.Pipe()
	go func() {
		_, _ = io.Copy(in, call)
		_ = in.Close()
	}()
	go func() {
		defer close(c.flushed)
		_, err := io.Copy(call, out)
		_ = out.Close()
		if err == nil {
			_ = call.CloseWrite()
		}
	}()
	return c
}

// Read implements [net.Conn].
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.read.Read(p)
	return n, c.explain("read", err)
}

// Write implements [net.Conn].
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.write.Write(p)
	return n, c.explain("write", err)
}

// explain makes a pipe's error that of a connection.
func (c *conn) explain(op string, err error) error {
	switch {
	case err == nil || errors.Is(err, io.EOF):
		return err
	case errors.Is(err, io.ErrClosedPipe) && c.closed.Load():
		err = net.ErrClosed
	case errors.Is(err, io.ErrClosedPipe):
		err = syscall.EPIPE
	}
	return &net.OpError{Op: op, Net: c.addr.network, Addr: c.addr, Err: err}
}

// CloseWrite ends the writing. What was written is sent.
func (c *conn) CloseWrite() error { return c.write.Close() }

// Close implements [net.Conn]. What was written is sent, unless the guest does not take it.
func (c *conn) Close() error {
	if c.closed.Swap(true) {
		return &net.OpError{Op: "close", Net: c.addr.network, Addr: c.addr, Err: net.ErrClosed}
	}
	_, _ = c.read.Close(), c.write.Close()
	select {
	case <-c.flushed:
	case <-c.call.over:
	case <-time.After(answerTime):
	}
	c.call.abandon()
	return nil
}

// LocalAddr implements [net.Conn]. The host's end has no address.
func (c *conn) LocalAddr() net.Addr { return guestAddr{network: c.addr.network} }

// RemoteAddr implements [net.Conn].
func (c *conn) RemoteAddr() net.Addr { return c.addr }

// SetDeadline implements [net.Conn].
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements [net.Conn].
func (c *conn) SetReadDeadline(t time.Time) error {
	return c.explain("set", c.read.SetReadDeadline(t))
}

// SetWriteDeadline implements [net.Conn].
func (c *conn) SetWriteDeadline(t time.Time) error {
	err := c.write.SetWriteDeadline(t)
	if errors.Is(err, io.ErrClosedPipe) && !c.closed.Load() {
		return nil // only the writing has ended; a deadline for both must still be possible
	}
	return c.explain("set", err)
}
