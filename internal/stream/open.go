package stream

import (
	"io"
	"sync"
)

// Open is what is open at the moment, and is to be closed together. The zero value is ready to
// use.
type Open struct {
	mu     sync.Mutex // guards the following
	closed bool
	all    map[io.Closer]struct{}
}

// Add has c closed with the others. It reports false, and does nothing, if they have been
// closed already.
func (o *Open) Add(c io.Closer) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return false
	}
	if o.all == nil {
		o.all = map[io.Closer]struct{}{}
	}
	o.all[c] = struct{}{}
	return true
}

// Remove forgets c, which has been closed.
func (o *Open) Remove(c io.Closer) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.all, c)
}

// Keep has c closed with the others, at once if they have been closed already. It is
// forgotten when what is returned is closed, which closes c.
func (o *Open) Keep(c io.Closer) io.Closer {
	k := &kept{of: o, Closer: c}
	if !o.Add(k) {
		_ = k.Close()
	}
	return k
}

type kept struct {
	of *Open
	io.Closer
}

// Close implements [io.Closer].
func (k *kept) Close() error {
	k.of.Remove(k)
	return k.Closer.Close()
}

// Close closes all that is open, one after the other, and lets nothing be added any more. It
// reports whether it is the first to do so.
func (o *Open) Close() (first bool) {
	o.mu.Lock()
	first = !o.closed
	all := o.all
	o.all, o.closed = nil, true
	o.mu.Unlock()
	for c := range all {
		_ = c.Close()
	}
	return first
}
