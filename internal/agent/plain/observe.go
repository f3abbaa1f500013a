package plain

import (
	"bytes"
	"encoding/binary"
)

// Observer reads one direction of a channel's connection along, as whoever passes it on writes it
// to the observer too. It keeps no more than the frame that it is in, and of data nothing. What it
// is not told by these functions, it passes over; each may be nil.
type Observer struct {
	// Opened is called for what opens a channel.
	Opened func(kind string, payload []byte)
	// Requested is called for a request.
	Requested func(name string, payload []byte)
	// Data is called for data and standard error, as they come.
	Data func(p []byte)
	// Foreign is called once, when what comes is not of this protocol. Nothing else is called
	// from then on.
	Foreign func()

	header  []byte
	left    int // bytes of the frame's body that are to come
	body    []byte
	foreign bool
}

// Write implements [io.Writer]. It takes all, and keeps nothing of it.
func (o *Observer) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0 && !o.foreign; {
		if o.left == 0 {
			rest = o.begin(rest)
			continue
		}
		part := rest[:min(len(rest), o.left)]
		rest, o.left = rest[len(part):], o.left-len(part)
		o.take(part)
	}
	return len(p), nil
}

// begin reads of a frame's header, and returns what follows.
func (o *Observer) begin(p []byte) (rest []byte) {
	part := p[:min(len(p), headerSize-len(o.header))]
	o.header = append(o.header, part...)
	if !bytes.ContainsRune([]byte{frameOpen, frameAccept, frameReject, frameData, frameStderr, frameCredit, frameRequest, frameEnd}, rune(o.header[0])) {
		o.end()
		return nil
	}
	if len(o.header) < headerSize {
		return nil
	}
	size := binary.BigEndian.Uint32(o.header[1:])
	if size > maxBody {
		o.end()
		return nil
	}
	if o.left = int(size); o.left == 0 {
		o.header = o.header[:0]
	}
	return p[len(part):]
}

func (o *Observer) end() {
	o.foreign, o.body = true, nil
	if o.Foreign != nil {
		o.Foreign()
	}
}

// take takes a part of a frame's body, the last one if nothing is left.
func (o *Observer) take(part []byte) {
	last := o.left == 0
	switch kind := o.header[0]; kind {
	case frameData, frameStderr:
		if o.Data != nil {
			o.Data(part)
		}
	case frameOpen, frameRequest:
		o.body = append(o.body, part...)
		if last {
			o.tell(kind, o.body)
			o.body = nil
		}
	}
	if last {
		o.header = o.header[:0]
	}
}

// tell tells of a frame that has come whole. One that makes no sense is the other end's to refuse.
func (o *Observer) tell(kind byte, body []byte) {
	if kind == frameOpen {
		if _, rest, ok := cutText(body); ok {
			if name, payload, ok := cutText(rest); ok && o.Opened != nil {
				o.Opened(name, payload)
			}
		}
		return
	}
	if name, payload, ok := cutText(body); ok && o.Requested != nil && len(body) <= maxRequest {
		o.Requested(name, payload)
	}
}
