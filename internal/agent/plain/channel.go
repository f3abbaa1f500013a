package plain

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/crypto/ssh"
)

// Read implements [io.Reader].
func (c *Channel) Read(p []byte) (int, error) { return c.read(0, p) }

// Write implements [io.Writer].
func (c *Channel) Write(p []byte) (int, error) { return c.send(frameData, p) }

// Stderr implements [ssh.Channel].
func (c *Channel) Stderr() io.ReadWriter { return stderr{c} }

type stderr struct{ c *Channel }

func (s stderr) Read(p []byte) (int, error)  { return s.c.read(1, p) }
func (s stderr) Write(p []byte) (int, error) { return s.c.send(frameStderr, p) }

// CloseWrite implements [ssh.Channel].
func (c *Channel) CloseWrite() error { return c.write(frameEnd, nil) }

// SendRequest implements [ssh.Channel]. As requests have no replies, none is waited for.
func (c *Channel) SendRequest(name string, _ bool, payload []byte) (bool, error) {
	if len(name) > 255 || 1+len(name)+len(payload) > maxRequest {
		return false, fmt.Errorf("a request of %d bytes is too long", len(name)+len(payload))
	}
	err := c.write(frameRequest, append(append([]byte{byte(len(name))}, name...), payload...))
	return err == nil, err
}

// Close implements [ssh.Channel]. What the other end has sent until it hears of it is
// dropped, but for its requests.
func (c *Channel) Close() error {
	c.mu.Lock()
	closed := c.closed
	c.closed = true
	c.changed.Broadcast()
	c.mu.Unlock()
	if closed {
		return io.EOF // as SSH's channels have it
	}
	// Not while a frame is written: the other end would get half of it.
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.conn.CloseWrite()
}

// Abort ends the channel whatever the other end does.
func (c *Channel) Abort() { _ = c.conn.Close() }

// NewChannel is a channel that a client asks for. It implements [ssh.NewChannel].
type NewChannel struct {
	channel  *Channel
	kind     string
	identity string
	payload  []byte
}

// Accept reads what channel is asked for over a connection, which is closed on failure.
func Accept(conn Conn) (*NewChannel, error) {
	n, err := readOpen(conn)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("read which channel is asked for: %w", err)
	}
	n.channel = newChannel(conn)
	return n, nil
}

func readOpen(conn io.Reader) (*NewChannel, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[1:])
	if header[0] != frameOpen || size > maxBody {
		return nil, fmt.Errorf("%w: a frame of kind %q with %d bytes", errProtocol, header[0], size)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(conn, body); err != nil {
		return nil, err
	}
	var n NewChannel
	var ok bool
	if n.identity, body, ok = cutText(body); ok {
		n.kind, n.payload, ok = cutText(body)
	}
	if !ok {
		return nil, fmt.Errorf("%w: an open that is cut short", errProtocol)
	}
	return &n, nil
}

// cutText cuts a text of up to 255 bytes off, which begins with its length.
func cutText(b []byte) (text string, rest []byte, ok bool) {
	if len(b) == 0 || len(b) < 1+int(b[0]) {
		return "", nil, false
	}
	return string(b[1 : 1+int(b[0])]), b[1+int(b[0]):], true
}

// PeekSize is how many bytes [IsOpen] has to see.
const PeekSize = 2

// IsOpen reports whether a connection begins with an open, and not with SSH or a message.
func IsOpen(first []byte) bool { return len(first) > 1 && first[0] == frameOpen && first[1] == 0 }

// Identity returns the identity of the guest that the client means.
func (n *NewChannel) Identity() string { return n.identity }

// ChannelType implements [ssh.NewChannel].
func (n *NewChannel) ChannelType() string { return n.kind }

// ExtraData implements [ssh.NewChannel].
func (n *NewChannel) ExtraData() []byte { return n.payload }

// Accept implements [ssh.NewChannel].
func (n *NewChannel) Accept() (ssh.Channel, <-chan *ssh.Request, error) {
	if err := n.channel.write(frameAccept, nil); err != nil {
		_ = n.channel.conn.Close()
		return nil, nil, err
	}
	go n.channel.receive()
	return n.channel, n.channel.requests, nil
}

// Reject implements [ssh.NewChannel]. The reason is said by the message.
func (n *NewChannel) Reject(_ ssh.RejectionReason, message string) error {
	err := n.channel.write(frameReject, []byte(message[:min(len(message), maxReason)]))
	return errors.Join(err, n.channel.conn.Close())
}
