package usernet

import (
	"errors"
	"sync"
	"time"
)

const (
	// bufferTotal is what the buffers of all TCP connections with a guest may hold
	// together, in bytes, but for minBuffer of each.
	bufferTotal = 32 << 20
	// bufferShare is the part of what is left that a new connection is given: while there
	// are few, each has all that it can use, and the more there are, the less.
	bufferShare = 64
	// minBuffer is what each direction of a connection may hold, in bytes, however many
	// there are.
	minBuffer = 16 << 10
)

// limits are what a guest may have at once. Together with [bufferTotal] they keep what TCP
// connections cost the process below 64 MiB, whatever the guest and the outside do.
type limits struct {
	// outgoing bounds the guest's TCP connections to the outside, each of which costs
	// this process two sockets; incoming those that forwards and [Network.DialGuest]
	// make; names those to the DNS server.
	outgoing, incoming, names int
	// linger is how long a guest may take for what is left to be sent to it when the
	// other side of a connection is done.
	linger time.Duration
}

// usualLimits let a guest linger as long as Linux does (net.ipv4.tcp_fin_timeout).
func usualLimits() limits {
	return limits{outgoing: 512, incoming: 512, names: 16, linger: time.Minute}
}

// errTooMany means that a guest has as many connections as it may have.
var errTooMany = errors.New("the guest has too many connections")

// account keeps count of a guest's TCP connections. One counts for as long as the stack
// holds anything of it: a guest that lets connections be closed, and never acknowledges
// what they still hold, would be given more and more memory otherwise.
type account struct {
	linger  time.Duration
	done    chan struct{}  // closed when no connection is waited for any more
	running sync.WaitGroup // counts the connections

	mu     sync.Mutex // guards the following
	closed bool
	held   int // by buffers, in bytes
}

// kind is the connections of one kind; its account guards it.
type kind struct {
	*account
	limit, count int
}

func newAccount(linger time.Duration) *account {
	return &account{linger: linger, done: make(chan struct{})}
}

// close lets no connection begin any more, and has those that there are dropped.
func (a *account) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.closed {
		a.closed = true
		close(a.done)
	}
}

// reservation is the place of one connection.
type reservation struct {
	of     *kind
	buffer int // for each direction, in bytes
	once   sync.Once
}

// reserve makes room for a connection. It is to be released if none is made of it.
func (k *kind) reserve() (*reservation, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || k.count >= k.limit {
		return nil, errTooMany
	}
	r := &reservation{of: k, buffer: min(max((bufferTotal-k.held)/bufferShare, minBuffer), tcpBuffer)}
	k.count++
	k.held += 2 * r.buffer
	k.running.Add(1)
	return r, nil
}

func (r *reservation) release() {
	r.once.Do(func() {
		r.of.mu.Lock()
		defer r.of.mu.Unlock()
		r.of.count--
		r.of.held -= 2 * r.buffer
		r.of.running.Done()
	})
}
