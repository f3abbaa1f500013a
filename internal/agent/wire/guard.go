package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// yamux's frames; see the specification in its repository.
const (
	frameHeader = 12

	frameData         = 0 // the type of frames that have a body
	frameWindowUpdate = 1
	framePing         = 2
	frameGoAway       = 3

	flagSYN = 1
	flagACK = 2
	flagFIN = 4
	flagRST = 8

	// initialWindow is how much either end may send on a new stream, in bytes.
	initialWindow = 256 << 10
	// maxWindow is how much it may come to be; see MuxConfig.
	maxWindow = 1 << 20
)

// ErrProtocol is matched by the error that ends a session whose guest has sent what an
// agent never sends.
var ErrProtocol = errors.New("the guest does not keep to the channel's protocol")

// Guard is the host's end of a session. It checks each frame that the guest sends before
// yamux sees it, and ends the session at the first that an agent never sends: yamux
// trusts its peer, and answers a ping from a goroutine of its own, keeps streams that
// nobody accepts, and can be made to wait in its reading goroutine.
//
// What it keeps is a few bytes for each stream that the host has open.
type Guard struct {
	io.ReadWriteCloser

	// Of the frame that is being read; used by Read only.
	header  [frameHeader]byte
	have    int    // bytes of the header
	body    uint32 // bytes of the body that are still to come
	failure error

	mu      sync.Mutex
	streams map[uint32]*guarded
	highest uint32 // the last stream that the host has opened
	broken  error  // failure, for others
}

// guarded is the state of one stream.
type guarded struct {
	send    uint32 // how much the host may still send
	receive uint32 // how much the guest may still send

	acknowledged            bool
	hostClosed, guestClosed bool
}

// Err returns what the guest has done that ended the session; nil if it was not that.
func (g *Guard) Err() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.broken
}

// Read implements [io.Reader]. Nothing of a frame that is refused is passed on.
func (g *Guard) Read(p []byte) (int, error) {
	if g.failure != nil {
		return 0, g.failure
	}
	n, err := g.ReadWriteCloser.Read(p)
	for done := 0; done < n; {
		if g.body > 0 {
			skip := min(int(g.body), n-done)
			g.body -= uint32(skip)
			done += skip
			continue
		}
		copied := copy(g.header[g.have:], p[done:n])
		g.have += copied
		if g.have < frameHeader {
			break
		}
		if g.failure = g.check(g.header[:]); g.failure != nil {
			return done, g.failure
		}
		g.have = 0
		done += copied
		if g.header[1] == frameData {
			g.body = binary.BigEndian.Uint32(g.header[8:])
		}
	}
	return n, err
}

// check checks the header of a frame from the guest, and keeps the books.
func (g *Guard) check(header []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.receive(header); err != nil {
		g.broken = fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return g.broken
}

func (g *Guard) receive(header []byte) error {
	flags, id, length := binary.BigEndian.Uint16(header[2:]), binary.BigEndian.Uint32(header[4:]), binary.BigEndian.Uint32(header[8:])
	switch {
	case header[0] != 0:
		return fmt.Errorf("frame of version %d", header[0])
	case header[1] == framePing:
		return errors.New("it pings")
	case header[1] == frameGoAway:
		return fmt.Errorf("it ends the session, with code %d", length)
	case header[1] != frameData && header[1] != frameWindowUpdate:
		return fmt.Errorf("frame of type %d", header[1])
	case flags&flagSYN != 0:
		return fmt.Errorf("it opens stream %d", id)
	case flags&^(flagACK|flagFIN|flagRST) != 0:
		return fmt.Errorf("frame with flags %#x", flags)
	case id%2 == 0 || id > g.highest:
		return fmt.Errorf("frame of stream %d, which was never opened", id)
	case length > maxWindow:
		return fmt.Errorf("frame of %d bytes", length)
	}
	stream := g.streams[id]
	if stream == nil {
		return nil // it was closed, which the guest did not know yet; yamux throws it away
	}
	if flags&flagACK != 0 {
		if stream.acknowledged {
			return fmt.Errorf("it accepts stream %d twice", id)
		}
		stream.acknowledged = true
	}
	if header[1] == frameData {
		if length > stream.receive {
			return fmt.Errorf("it sends %d bytes on stream %d, where %d are allowed", length, id, stream.receive)
		}
		stream.receive -= length
	} else {
		if length > maxWindow-stream.send {
			return fmt.Errorf("it opens the window of stream %d to %d bytes", id, uint64(stream.send)+uint64(length))
		}
		stream.send += length
	}
	if flags&flagFIN != 0 {
		if stream.guestClosed {
			return fmt.Errorf("it closes stream %d twice", id)
		}
		stream.guestClosed = true
	}
	if flags&flagRST != 0 || (stream.hostClosed && stream.guestClosed) {
		delete(g.streams, id)
	}
	return nil
}

// Write implements [io.Writer]. Each call is one frame; see [WholeFrames].
func (g *Guard) Write(frame []byte) (int, error) {
	// Before it is written, as the guest may answer before the write has returned.
	if len(frame) >= frameHeader {
		g.sent(frame)
	}
	return g.ReadWriteCloser.Write(frame)
}

// sent keeps the books of a frame of the host's.
func (g *Guard) sent(frame []byte) {
	flags, id, length := binary.BigEndian.Uint16(frame[2:]), binary.BigEndian.Uint32(frame[4:]), binary.BigEndian.Uint32(frame[8:])
	if frame[1] != frameData && frame[1] != frameWindowUpdate {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if flags&flagSYN != 0 {
		if g.streams == nil {
			g.streams = map[uint32]*guarded{}
		}
		g.streams[id] = &guarded{send: initialWindow, receive: initialWindow}
		g.highest = max(g.highest, id)
	}
	stream := g.streams[id]
	if stream == nil {
		return
	}
	if frame[1] == frameData {
		stream.send -= min(length, stream.send)
	} else {
		stream.receive += length
	}
	stream.hostClosed = stream.hostClosed || flags&flagFIN != 0
	if flags&flagRST != 0 || (stream.hostClosed && stream.guestClosed) {
		delete(g.streams, id)
	}
}
