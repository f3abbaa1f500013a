// Package plain carries what an SSH channel carries, without SSH: data both ways, standard
// error, and requests. A connection is one channel. It is how smolvm's own calls reach the
// guest's agent: whoever can open a connection to it holds the VM itself, so there is
// nobody to authenticate and nothing to hide, and encryption is what an emulated guest
// spends most of a copy on. Both ends implement SSH's interfaces, so that what serves and
// uses channels need not know which kind it has.
//
// # Format
//
// A connection is a sequence of frames in each direction: one byte for the kind, four for
// the length of the body, big-endian, and the body. The client's first frame is an open;
// the server answers it by an accept or a reject. Every kind but credits counts on its own;
// data and standard error share one window, as in SSH: a sender may have [Window] bytes
// under way that the receiver has not given back by a credit. Requests have no replies.
// A connection that ends has closed the channel; an end of input is a frame of its own.
package plain

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"
)

// Window is how many bytes of data and standard error may be under way in each direction.
const Window = 1 << 20

const (
	frameOpen    = 'O' // identity, length of the type, type, payload
	frameAccept  = 'A'
	frameReject  = 'R' // text
	frameData    = 'D'
	frameStderr  = 'E'
	frameCredit  = 'C' // four bytes: so many more may be sent
	frameRequest = 'Q' // length of the name, name, payload
	frameEnd     = 'X' // no more data or standard error follows

	headerSize = 5
	// maxChunk is the longest body of data that is sent, and maxBody the longest of all
	// that is accepted, which is an open's. What opens a channel is at most half of that;
	// see [wire.ExecRequest.Pack].
	maxChunk = 32 << 10
	maxBody  = 256 << 10
	// maxRequest bounds a request's name and payload together.
	maxRequest = 16 << 10
	// maxReason bounds the text of a reject, and maxLine one that is not in a frame.
	maxReason, maxLine = 4 << 10, 200
)

// ErrSSH is the error of [Open] when the other end speaks SSH only.
var ErrSSH = errors.New("the agent speaks SSH only")

// errProtocol reports that the other end has sent what it may not send.
var errProtocol = errors.New("the guest's agent does not keep to the protocol")

// Conn is what a channel needs of a connection. CloseWrite closes the channel for the other
// end, whose last words can still be read.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Channel is an open channel. It implements [ssh.Channel].
type Channel struct {
	conn Conn

	writing sync.Mutex // held while a frame is written

	mu      sync.Mutex
	changed *sync.Cond // of all that follows
	in      [2]bytes.Buffer
	used    int   // of the other end's window: bytes for which no credit was given yet
	owed    int   // those of them that were read
	inEnded bool  // no more data comes
	over    bool  // the connection has ended
	err     error // why it has, if it was not in order
	window  int   // bytes that may be sent
	closed  bool  // by us

	requests chan *ssh.Request
}

func newChannel(conn Conn) *Channel {
	c := &Channel{conn: conn, window: Window, requests: make(chan *ssh.Request, 1)}
	c.changed = sync.NewCond(&c.mu)
	return c
}

// Open opens a channel over a connection, which it then owns; on failure the connection is
// closed. The guest refuses it unless it has the given identity, of at most 255 bytes. The
// error is [*ssh.OpenChannelError] if the other end refuses, and matches [ErrSSH] if it
// can't speak this protocol. Open returns when conn is closed.
func Open(conn Conn, identity, kind string, payload []byte) (*Channel, <-chan *ssh.Request, error) {
	c := newChannel(conn)
	open := append([]byte{byte(len(identity))}, identity...)
	open = append(append(append(open, byte(len(kind))), kind...), payload...)
	err := c.write(frameOpen, open)
	if err == nil {
		err = c.readAnswer()
	}
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	go c.receive()
	return c, c.requests, nil
}

// readAnswer reads whether the channel was opened.
func (c *Channel) readAnswer() error {
	var header [headerSize]byte
	if _, err := io.ReadFull(c.conn, header[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(header[1:])
	switch kind := header[0]; {
	case string(header[:4]) == "SSH-":
		return ErrSSH
	case kind == frameAccept && size == 0:
		return nil
	case kind == frameReject && size <= maxReason:
		text := make([]byte, size)
		if _, err := io.ReadFull(c.conn, text); err != nil {
			return err
		}
		return &ssh.OpenChannelError{Reason: ssh.ConnectionFailed, Message: string(text)}
	}
	return c.explainAnswer(header[:])
}

// explainAnswer makes an error of an answer that is none. A shim tells in a line of text why
// it can't connect anybody to the guest.
func (c *Channel) explainAnswer(begin []byte) error {
	line, _ := bufio.NewReader(io.LimitReader(io.MultiReader(bytes.NewReader(begin), c.conn), maxLine)).ReadString('\n')
	if text := strings.TrimRight(line, "\r\n"); text != line && !strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
		return errors.New(text)
	}
	return fmt.Errorf("%w: its answer begins with %q", errProtocol, begin)
}

// write writes one frame.
func (c *Channel) write(kind byte, body []byte) error {
	// One write, as each is a frame of what the connection runs over.
	frame := make([]byte, headerSize, headerSize+len(body))
	frame[0] = kind
	binary.BigEndian.PutUint32(frame[1:], uint32(len(body)))
	frame = append(frame, body...)
	c.writing.Lock()
	defer c.writing.Unlock()
	_, err := c.conn.Write(frame)
	return err
}

// receive reads frames until the connection ends.
func (c *Channel) receive() {
	err := c.readFrames()
	c.mu.Lock()
	c.over, c.inEnded = true, true
	if err != io.EOF { //nolint:errorlint // a broken frame's is another
		c.err = err
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	close(c.requests)
	// Nobody reads any more, so nobody may have to wait until something is written.
	_ = c.conn.Close()
}

func (c *Channel) readFrames() error {
	var header [headerSize]byte
	body := make([]byte, maxChunk)
	for {
		if _, err := io.ReadFull(c.conn, header[:1]); err != nil {
			return err
		}
		if _, err := io.ReadFull(c.conn, header[1:]); err != nil {
			return noEOF(err)
		}
		size := binary.BigEndian.Uint32(header[1:])
		if size > maxChunk {
			return fmt.Errorf("%w: a frame of %d bytes", errProtocol, size)
		}
		if _, err := io.ReadFull(c.conn, body[:size]); err != nil {
			return noEOF(err)
		}
		if err := c.take(header[0], body[:size]); err != nil {
			return err
		}
	}
}

func noEOF(err error) error {
	if err == io.EOF { //nolint:errorlint // readers return it bare
		return io.ErrUnexpectedEOF
	}
	return err
}

// take takes one frame; body is only valid until it returns.
func (c *Channel) take(kind byte, body []byte) error {
	switch kind {
	case frameRequest:
		return c.takeRequest(body)
	case frameCredit:
		if len(body) != 4 {
			return fmt.Errorf("%w: a credit of %d bytes", errProtocol, len(body))
		}
		return c.takeCredit(binary.BigEndian.Uint32(body))
	case frameEnd:
		c.mu.Lock()
		c.inEnded = true
		c.changed.Broadcast()
		c.mu.Unlock()
		return nil
	case frameData:
		return c.takeData(&c.in[0], body)
	case frameStderr:
		return c.takeData(&c.in[1], body)
	}
	return fmt.Errorf("%w: a frame of kind %q", errProtocol, kind)
}

func (c *Channel) takeRequest(body []byte) error {
	if len(body) == 0 || len(body) < 1+int(body[0]) || len(body) > maxRequest {
		return fmt.Errorf("%w: a request of %d bytes", errProtocol, len(body))
	}
	name, payload := body[1:1+int(body[0])], body[1+int(body[0]):]
	c.requests <- &ssh.Request{Type: string(name), Payload: bytes.Clone(payload)}
	return nil
}

func (c *Channel) takeCredit(size uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if int64(c.window)+int64(size) > Window {
		return fmt.Errorf("%w: a credit of %d bytes, more than was sent", errProtocol, size)
	}
	c.window += int(size)
	c.changed.Broadcast()
	return nil
}

func (c *Channel) takeData(to *bytes.Buffer, body []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.inEnded:
		return fmt.Errorf("%w: data after its end", errProtocol)
	case c.used+len(body) > Window:
		return fmt.Errorf("%w: more data than it may send", errProtocol)
	case c.closed:
		return nil // nobody wants it
	}
	c.used += len(body)
	to.Write(body) // at most Window bytes in both
	c.changed.Broadcast()
	return nil
}

// read implements Read for data (0) and for standard error (1).
func (c *Channel) read(from int, p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.mu.Lock()
	for c.in[from].Len() == 0 && !c.inEnded && !c.closed {
		c.changed.Wait()
	}
	n, _ := c.in[from].Read(p)
	if c.in[from].Len() == 0 && c.in[from].Cap() > maxChunk {
		c.in[from] = bytes.Buffer{} // so that an idle channel has no memory
	}
	c.owed += n
	credit := 0
	if c.owed >= Window/2 && !c.inEnded {
		credit, c.owed = c.owed, 0
		c.used -= credit
	}
	err := c.err
	c.mu.Unlock()
	if credit > 0 {
		// If it can't be written, reading fails too.
		_ = c.write(frameCredit, binary.BigEndian.AppendUint32(nil, uint32(credit)))
	}
	switch {
	case n > 0:
		return n, nil
	case err != nil:
		return 0, err
	}
	return 0, io.EOF
}

// send implements Write for data and for standard error.
func (c *Channel) send(kind byte, p []byte) (int, error) {
	done := 0
	for done < len(p) {
		size, err := c.reserve(min(len(p)-done, maxChunk))
		if err == nil {
			err = c.write(kind, p[done:done+size])
		}
		if err != nil {
			return done, err
		}
		done += size
	}
	return done, nil
}

// reserve waits until something may be sent, and returns how much of what is wanted.
func (c *Channel) reserve(want int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.window == 0 && !c.closed && !c.over {
		c.changed.Wait()
	}
	if c.closed || c.over {
		return 0, io.EOF
	}
	size := min(want, c.window)
	c.window -= size
	return size, nil
}
