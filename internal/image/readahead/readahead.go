// Package readahead reads a stream in a goroutine of its own, so that what unpacks and what uses it
// take turns on two CPUs.
package readahead

import (
	"context"
	"io"
)

const (
	// chunkSize is how much is read ahead at once, in bytes, and chunks how many of them.
	chunkSize = 256 << 10
	chunks    = 8
)

// Reader is a reader of what a goroutine has read already.
type Reader struct {
	ctx    context.Context // of the call that it is for
	cancel context.CancelFunc
	full   chan chunk
	free   chan []byte
	done   chan struct{}
	now    chunk
	rest   []byte
}

// chunk is what was read at once.
type chunk struct {
	buffer []byte
	n      int
	err    error
}

// New begins to read. It ends with the reader, with the context, or by Stop, which has to be called
// before the reader may be closed.
func New(ctx context.Context, r io.Reader) *Reader {
	ctx, cancel := context.WithCancel(ctx)
	a := &Reader{ctx: ctx, cancel: cancel, full: make(chan chunk, chunks), free: make(chan []byte, chunks), done: make(chan struct{})}
	for range chunks {
		a.free <- make([]byte, chunkSize)
	}
	go a.run(r)
	return a
}

func (a *Reader) run(r io.Reader) {
	defer close(a.done)
	for {
		select {
		case <-a.ctx.Done():
			return
		case buffer := <-a.free:
			n, err := io.ReadFull(r, buffer)
			if err == io.ErrUnexpectedEOF && n > 0 {
				// Whether the reader has ended, or has been cut off, it tells once more.
				err = nil
			}
			a.full <- chunk{buffer, n, err} // as many fit in as there are
			if err != nil {
				return
			}
		}
	}
}

// Stop ends the goroutine, and waits for it.
func (a *Reader) Stop() {
	a.cancel()
	<-a.done
}

func (a *Reader) Read(b []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.now.err != nil {
			return 0, a.now.err
		}
		if a.now.buffer != nil {
			a.free <- a.now.buffer
			a.now.buffer = nil
		}
		select {
		case a.now = <-a.full:
			a.rest = a.now.buffer[:a.now.n]
		case <-a.ctx.Done():
			return 0, context.Cause(a.ctx)
		}
	}
	n := copy(b, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}
