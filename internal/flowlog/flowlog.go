// Package flowlog writes and reads flow logs: what the guest of a VM had to do with the outside,
// and what users have had it do, in lines of JSON ([smolvm.FlowRecord]) outside of the guest.
//
// Each line has the hash of the one before it, so that one that was changed, removed or put in
// between is found by whoever reads the log. It has no key: who may write the file can write all
// of it anew. To notice that too, keep the last hash elsewhere.
//
// A log is two files, as those of package ring: the current one, and the one before it, whose name
// ends in ".1". The chain goes on from one to the next.
package flowlog

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smolvm/smolvm"
)

const (
	// FileBytes is how large each of a log's two files gets, in bytes: some forty thousand records
	// in both.
	FileBytes = 8 << 20
	// maxQueue is how many records wait to be written, and reserved how many places of these only
	// those have that no guest can make: it can make as many of its own as it likes.
	maxQueue, reserved = 1024, 128
	// closeTime is how long what is queued may take to be written at the end.
	closeTime = 5 * time.Second
)

// Log is a flow log that is written to. Its methods may be called from any goroutine, and do not
// wait for the disk, but for [Log.Close].
type Log struct {
	flows atomic.Int64
	wake  chan struct{} // holds an element when something was queued
	done  chan struct{} // closed when nothing is written any more

	mu     sync.Mutex // guards the following
	queue  []smolvm.FlowRecord
	lost   int64 // records that had no place in the queue
	closed bool
}

// New returns the log at a path, which is opened, and made if need be, when there is something to
// write. A problem with the file, such as a full disk, does not keep anything else from working: it
// is tried again with each record, and records that could not be written are counted, and recorded
// when that can be done again. Problem, which may be nil, is called when writing begins to fail.
func New(path string, problem func(error)) *Log {
	return newLog(&writer{path: path, limit: FileBytes}, problem)
}

func newLog(w *writer, problem func(error)) *Log {
	if problem == nil {
		problem = func(error) {}
	}
	l := &Log{wake: make(chan struct{}, 1), done: make(chan struct{})}
	go l.run(w, problem)
	return l
}

// NextFlow returns a number for a flow that has records.
func (l *Log) NextFlow() int64 { return l.flows.Add(1) }

// Record queues a record. If there are too many it is lost, and counted.
func (l *Log) Record(r smolvm.FlowRecord) {
	if r.At.IsZero() {
		r.At = time.Now()
	}
	r.At = r.At.UTC()
	r = Clean(r)
	most := maxQueue
	if isOfGuest(r.Kind) {
		most -= reserved
	}
	l.mu.Lock()
	switch {
	case l.closed:
	case len(l.queue) >= most:
		l.lost++
	default:
		l.queue = append(l.queue, r)
	}
	l.mu.Unlock()
	l.signal()
}

// isOfGuest reports whether a guest can have records of a kind made, as many as it likes.
func isOfGuest(kind smolvm.FlowKind) bool {
	switch kind {
	case smolvm.FlowDNS, smolvm.FlowTCP, smolvm.FlowUDP:
		return true
	default:
		return false
	}
}

func (l *Log) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Close writes what is queued, and closes the log. Nothing is recorded any more.
func (l *Log) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.signal()
	select {
	case <-l.done:
		return nil
	case <-time.After(closeTime):
		return fmt.Errorf("write the flow log: the disk has not taken it for %s", closeTime)
	}
}

// take returns what is queued, how many records had no place, and whether that was the last.
func (l *Log) take(spare []smolvm.FlowRecord) (queue []smolvm.FlowRecord, lost int64, closed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	queue, lost, closed = l.queue, l.lost, l.closed
	l.queue, l.lost = spare[:0], 0
	return queue, lost, closed
}

// run writes what is queued until the log is closed.
func (l *Log) run(w *writer, problem func(error)) {
	defer close(l.done)
	defer w.close()
	var spare []smolvm.FlowRecord
	failing := false
	for {
		<-l.wake
		queue, lost, closed := l.take(spare)
		if lost > 0 {
			w.lose(lost, "the guest made them faster than they could be written")
		}
		err := w.write(queue)
		if err != nil && !failing {
			problem(err)
		}
		failing = err != nil
		if closed {
			return
		}
		clear(queue) // so that what they refer to is not kept
		spare = queue
		if cap(spare) > maxQueue/8 {
			spare = nil // a shim idles for most of its life
		}
	}
}
