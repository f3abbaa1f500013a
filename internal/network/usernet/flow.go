package usernet

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/smolvm/smolvm"
)

const (
	// maxFlows bounds the guest's UDP flows, each of which costs this process a socket
	// and two buffers of maxDatagram. When there are more, the one that has been idle
	// for longest ends.
	maxFlows = 256
	// flowIdle is how long a flow without traffic lasts (RFC 4787, section 4.3: no
	// less than two minutes).
	flowIdle = 2 * time.Minute
	// flowCheck is how long a flow goes on before it is asked again whether the guest may
	// have its address, as that may have become the host's: its socket would reach it.
	flowCheck = time.Second
	// maxDatagram is the longest payload of UDP over IPv4, in bytes.
	maxDatagram = 65507
)

// flow is all that the guest sends over UDP from one port to one address, and what
// comes back.
type flow struct {
	guest, outside net.Conn
	check          func() error // returns an error if the guest may not have the address
	checked        time.Time    // when that was last asked
	last           atomic.Int64 // when something passed, in nanoseconds of the Unix time
	once           sync.Once
}

// send begins a flow with its first datagram. It runs where the guest's frames are
// read, so it does not wait for anything. It reports whether the datagram was taken; of
// one that was not, the stack tells the guest by ICMP that the port is unreachable.
func (o *outbound) send(request *udp.ForwarderRequest) bool {
	outside, err := o.dial(destination(request.ID()), smolvm.UDP)
	if err != nil {
		return false
	}
	var queue waiter.Queue
	endpoint, failed := request.CreateEndpoint(&queue)
	if failed != nil {
		_ = outside.Close()
		return true // lost, as happens to datagrams
	}
	f := &flow{guest: gonet.NewUDPConn(&queue, endpoint), outside: outside, checked: time.Now()}
	from, to := addrPort(outside.LocalAddr()), addrPort(outside.RemoteAddr())
	f.check = func() error { return o.check(smolvm.UDP, from, to) }
	f.touch()
	if !o.beginFlow(f) {
		f.close()
		return true
	}
	go func() {
		defer o.endFlow(f)
		f.run()
	}()
	return true
}

func (o *outbound) beginFlow(f *flow) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return false
	}
	if len(o.flows) >= maxFlows {
		idlest := f
		for other := range o.flows {
			if other.last.Load() < idlest.last.Load() {
				idlest = other
			}
		}
		idlest.close()
		delete(o.flows, idlest)
	}
	o.flows[f] = struct{}{}
	o.running.Add(1)
	return true
}

func (o *outbound) endFlow(f *flow) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.flows, f)
	o.running.Done()
}

func (f *flow) touch() { f.last.Store(time.Now().UnixNano()) }

func (f *flow) close() {
	f.once.Do(func() { _, _ = f.guest.Close(), f.outside.Close() })
}

// run copies datagrams both ways until the flow is closed or has been idle.
func (f *flow) run() {
	var outgoing sync.WaitGroup
	outgoing.Go(func() {
		defer f.close()
		f.copy(f.outside, f.guest, f.stillAllowed)
	})
	f.copy(f.guest, f.outside, func() bool { return true })
	f.close()
	outgoing.Wait()
}

// stillAllowed reports whether the guest may still have the flow's address.
func (f *flow) stillAllowed() bool {
	now := time.Now()
	if now.Sub(f.checked) < flowCheck {
		return true
	}
	f.checked = now
	return f.check() == nil
}

func (f *flow) copy(to, from net.Conn, allowed func() bool) {
	datagram := make([]byte, maxDatagram)
	for {
		idle := time.Since(time.Unix(0, f.last.Load()))
		if idle >= flowIdle {
			return
		}
		_ = from.SetReadDeadline(time.Now().Add(flowIdle - idle))
		n, err := from.Read(datagram)
		if errors.Is(err, os.ErrDeadlineExceeded) || isTimeout(err) {
			continue // the other direction may have been busy
		}
		// An error may also be that the datagram before was turned away. The guest's
		// next one begins a new flow.
		if err != nil || !allowed() {
			return
		}
		f.touch()
		if _, err := to.Write(datagram[:n]); err != nil {
			return
		}
	}
}

// isTimeout reports whether a deadline has passed; the stack's connections say it in
// their own way.
func isTimeout(err error) bool {
	timeout, ok := errors.AsType[net.Error](err)
	return ok && timeout.Timeout()
}
