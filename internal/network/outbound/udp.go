package outbound

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/sniff"
)

const (
	// MaxFlows bounds the guest's UDP flows, each of which costs this process a socket
	// and two buffers of MaxDatagram. When there are more, the one that has been idle
	// for longest ends.
	MaxFlows = 256
	// flowIdle is how long a flow without traffic lasts (RFC 4787, section 4.3: no
	// less than two minutes).
	flowIdle = 2 * time.Minute
	// flowCheck is how long a flow goes on before it is asked again whether the guest may
	// have its address, as that may have become the host's: its socket would reach it.
	flowCheck = time.Second
	// MaxDatagram is the longest payload of UDP over IPv4, in bytes.
	MaxDatagram = 65507
)

// flow is all that the guest sends over UDP from one port to one address, and what
// comes back.
type flow struct {
	guest, outside net.Conn
	of             *Outbound
	from           netip.AddrPort // of this process
	checked        time.Time      // when it was last asked whether the guest may have the flow
	last           atomic.Int64   // when something passed, in nanoseconds of the Unix time
	once           sync.Once
	recording

	mu   sync.Mutex // guards the following
	what network.Flow
}

// Send begins a flow of UDP with its first datagram, which is looked at only: accept returns a
// connection by which the flow's datagrams come from the guest, the first among them, and get
// to it. Send does not wait for anything, so it may run where the guest's frames are read. It
// reports whether the datagram was taken; of one that was not, accept is not called, and the
// guest is to be told by ICMP that the port is unreachable.
//
// A datagram that may be QUIC's states a name, which can't be read.
func (o *Outbound) Send(to netip.AddrPort, first []byte, accept func() (net.Conn, error)) bool {
	what := o.flowTo(to, smolvm.UDP)
	what.Names.Hidden = what.Names.Hidden || sniff.IsQUIC(first)
	outside, err := o.dial(&what)
	if err != nil {
		o.recordFailure(what, err)
		return false
	}
	guest, err := accept()
	if err != nil {
		_ = outside.Close()
		return true // lost, as happens to datagrams
	}
	f := &flow{
		guest: guest, outside: outside, checked: time.Now(),
		of: o, from: addrPort(outside.LocalAddr()), what: what,
	}
	f.touch()
	o.beginRecord(&f.recording, what, o.verdict(what))
	if !o.beginFlow(f) {
		f.close()
		o.endRecord(&f.recording, what, o.verdict(what))
		return true
	}
	f.recheck() // the policy may have been changed since
	go func() {
		defer o.endFlow(f)
		f.run()
		what := f.known()
		o.endRecord(&f.recording, what, o.verdict(what))
	}()
	return true
}

func (o *Outbound) beginFlow(f *flow) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return false
	}
	if len(o.flows) >= MaxFlows {
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

func (o *Outbound) endFlow(f *flow) {
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
		f.copy(f.outside, f.guest, &f.sent, f.stillAllowed)
	})
	f.copy(f.guest, f.outside, &f.received, func([]byte) bool { return true })
	f.close()
	outgoing.Wait()
}

// stillAllowed reports whether the guest may still have the flow's address, and send a
// datagram there.
func (f *flow) stillAllowed(datagram []byte) bool {
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	states := !f.what.Names.Hidden && sniff.IsQUIC(datagram)
	if now.Sub(f.checked) < flowCheck && !states {
		return true
	}
	f.checked = now
	f.what.Names.Hidden = f.what.Names.Hidden || states
	v, err := f.of.check(&f.what, f.from)
	return err == nil && v.Allowed
}

// known returns what is known of the flow.
func (f *flow) known() network.Flow {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.what
}

// recheck ends the flow at once if the policy does not allow it any more.
func (f *flow) recheck() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of.judge(f.what) != nil {
		f.close()
	}
}

func (f *flow) copy(to, from net.Conn, count *atomic.Int64, allowed func(datagram []byte) bool) {
	datagram := make([]byte, MaxDatagram)
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
		if err != nil || !allowed(datagram[:n]) {
			return
		}
		f.touch()
		if _, err := to.Write(datagram[:n]); err != nil {
			return
		}
		count.Add(int64(n))
	}
}

// isTimeout reports whether a deadline has passed; the stack's connections say it in
// their own way.
func isTimeout(err error) bool {
	timeout, ok := errors.AsType[net.Error](err)
	return ok && timeout.Timeout()
}
