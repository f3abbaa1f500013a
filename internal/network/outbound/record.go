package outbound

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// recorder adds to records what all of them have: the revision of the policy.
type recorder struct{ of *Outbound }

// NextFlow implements [network.Recorder].
func (r recorder) NextFlow() int64 { return r.of.late.NextFlow() }

// Record implements [network.Recorder].
func (r recorder) Record(record smolvm.FlowRecord) {
	record.EgressRevision = r.of.EgressRevision()
	r.of.late.Record(record)
}

// SetRecorder implements [network.Recorded].
func (o *Outbound) SetRecorder(r network.Recorder) { o.late.SetRecorder(r) }

// Recorder returns what takes the records of the guest, whoever makes them, and adds the revision of
// the policy.
func (o *Outbound) Recorder() network.Recorder { return recorder{o} }

// recordOf returns the record of a flow.
func (o *Outbound) recordOf(f network.Flow, v network.Verdict, event smolvm.FlowEvent) smolvm.FlowRecord {
	f.VMs = f.VMs || o.isInside(f.To.Addr())
	r := network.RecordOf(f, v)
	r.Event = event
	return r
}

// recordFailure records a flow that did not come about, for the reason of an error.
func (o *Outbound) recordFailure(f network.Flow, err error) {
	r := o.recordOf(f, o.verdict(f), smolvm.FlowFail)
	if errors.Is(err, ErrRefused) {
		r.Event = smolvm.FlowDeny
		if r.Verdict == smolvm.FlowAllowed { // by the policy, but not by the kernel's routes
			r.Verdict, r.Rule, r.Reason = smolvm.FlowDenied, "", err.Error()
		}
	} else {
		r.Detail = err.Error()
	}
	o.Recorder().Record(r)
}

// recording is what is recorded of a flow that was let through.
type recording struct {
	number         int64
	began          time.Time
	sent, received atomic.Int64 // in bytes

	naming  sync.Mutex // guards the following
	secrets []string   // names of those that were sent
}

// addSecrets notes the names of secrets that were put into what is sent.
func (c *recording) addSecrets(names []string) {
	c.naming.Lock()
	defer c.naming.Unlock()
	for _, name := range names {
		if !slices.Contains(c.secrets, name) {
			c.secrets = append(c.secrets, name)
		}
	}
}

// beginRecord records that a flow was let through.
func (o *Outbound) beginRecord(c *recording, f network.Flow, v network.Verdict) {
	c.number, c.began = o.late.NextFlow(), time.Now()
	r := o.recordOf(f, v, smolvm.FlowOpen)
	r.Flow = c.number
	o.Recorder().Record(r)
}

// endRecord records the end of a flow: if the policy does not allow it any more, that it was
// denied.
func (o *Outbound) endRecord(c *recording, f network.Flow, v network.Verdict) {
	event := smolvm.FlowClose
	if !v.Allowed && !v.Provisional {
		event = smolvm.FlowDeny
	}
	r := o.recordOf(f, v, event)
	r.Flow, r.Duration = c.number, time.Since(c.began)
	r.SentBytes, r.ReceivedBytes = c.sent.Load(), c.received.Load()
	c.naming.Lock()
	r.Secrets = slices.Clone(c.secrets)
	c.naming.Unlock()
	o.Recorder().Record(r)
}

// Forwarded records a flow of the guest that the host's kernel carries, without a verdict of ours
// on its packets. End records that it has ended, with the bytes that have passed.
func (o *Outbound) Forwarded(to netip.AddrPort, protocol smolvm.Protocol) (end func(sent, received int64)) {
	flow := o.flowTo(to, protocol)
	c := &recording{}
	v := o.verdict(flow)
	o.beginRecord(c, flow, v)
	return func(sent, received int64) {
		c.sent.Store(sent)
		c.received.Store(received)
		o.endRecord(c, flow, v)
	}
}
