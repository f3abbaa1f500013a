package wire

import (
	"encoding/binary"
	"errors"
	"io"
	"time"

	"github.com/hashicorp/yamux"
)

// MuxConfig returns the settings of yamux for the guest's end of a channel.
func MuxConfig() *yamux.Config {
	config := yamux.DefaultConfig()
	// A host that is starved, or a guest that was paused, answers late; that is no
	// reason to give the session up. The VMM's end closes the channel.
	config.EnableKeepAlive = false
	config.ConnectionWriteTimeout = endless
	config.StreamOpenTimeout = 0
	config.StreamCloseTimeout = endless
	config.MaxStreamWindowSize = maxWindow
	config.LogOutput = io.Discard
	return config
}

const (
	// endless is a time that is never over, where yamux must have one.
	endless = 365 * 24 * time.Hour
	// closeTimeout is how long the host remembers a stream that it has closed and the
	// guest has not. It bounds what a guest can have it keep that never closes any.
	closeTimeout = time.Minute
)

// HostMuxConfig returns the settings of yamux for the host's end. yamux's own timeout for
// writes can't know whether the guest is paused, so there is none: whoever uses the
// session waits no longer than its context, and what the channel is written by ends the
// session when a guest that runs takes nothing.
func HostMuxConfig() *yamux.Config {
	config := MuxConfig()
	config.StreamCloseTimeout = closeTimeout
	return config
}

// breakSequence ends a session from outside. It begins as a message does, but is none;
// the rest was drawn at random, so it does not occur in a session by chance.
const breakSequence = Magic + "break 5e1c09f2a7d84b36c1f0"

// Break returns the bytes that end a session from outside. A guest that was saved in the
// middle of a session resumes with that session open; its new host sends Break, and nothing
// more before the guest has said that it waits for a hello.
func Break() []byte { return []byte(breakSequence) }

// errBreak ends a session.
var errBreak = errors.New("session broken off by the host")

// BreakReader is the guest's end of a session; it fails once it has read a [Break].
type BreakReader struct {
	io.ReadWriteCloser
	tail []byte // the last bytes, fewer than a Break has
}

// Read implements [io.Reader].
func (r *BreakReader) Read(p []byte) (int, error) {
	n, err := r.ReadWriteCloser.Read(p)
	// As nothing follows a Break, it is always the end of what there is to read.
	r.tail = append(r.tail, p[max(0, n-len(breakSequence)):n]...)
	r.tail = r.tail[max(0, len(r.tail)-len(breakSequence)):]
	if err == nil && string(r.tail) == breakSequence {
		err = errBreak
	}
	return n, err
}

// WholeFrames writes what yamux writes in two pieces, a frame's header and its body, in
// one: each piece interrupts an emulated guest, or is one of its own.
type WholeFrames struct {
	io.ReadWriteCloser
	frame []byte // a header whose body is to come
}

// Write implements [io.Writer]. Only yamux may call it, which does so from one goroutine.
func (w *WholeFrames) Write(p []byte) (int, error) {
	if len(w.frame) == 0 {
		if len(p) == frameHeader && p[1] == frameData && binary.BigEndian.Uint32(p[8:]) > 0 {
			w.frame = append(w.frame, p...)
			return len(p), nil
		}
		return w.ReadWriteCloser.Write(p)
	}
	w.frame = append(w.frame, p...)
	_, err := w.ReadWriteCloser.Write(w.frame)
	w.frame = w.frame[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
