package network

import (
	"slices"
	"sync/atomic"

	"github.com/smolvm/smolvm"
)

// Recorder is told what a guest does by its network. Its methods may be called by any number of
// goroutines, and wait for nothing.
type Recorder interface {
	// NextFlow returns a number by which the records of one flow are known.
	NextFlow() int64
	// Record takes a record, whose texts may be of any length.
	Record(smolvm.FlowRecord)
}

// Recorded is a network that can tell a recorder of what the guest does.
type Recorded interface {
	// SetRecorder has it told from now on.
	SetRecorder(Recorder)
}

// LateRecorder is a [Recorder] that passes on what it is told, as soon as it knows to whom. Its zero
// value forgets everything.
type LateRecorder struct{ to atomic.Pointer[Recorder] }

// SetRecorder implements [Recorded].
func (l *LateRecorder) SetRecorder(r Recorder) { l.to.Store(&r) }

// NextFlow implements [Recorder].
func (l *LateRecorder) NextFlow() int64 {
	if to := l.to.Load(); to != nil {
		return (*to).NextFlow()
	}
	return 0
}

// Record implements [Recorder].
func (l *LateRecorder) Record(r smolvm.FlowRecord) {
	if to := l.to.Load(); to != nil {
		(*to).Record(r)
	}
}

// RecordOf returns the record of a flow, as far as the flow is known, and of the verdict on it.
func RecordOf(f Flow, v Verdict) smolvm.FlowRecord {
	asked := normalNames(f.Names.Asked)
	slices.Sort(asked)
	r := smolvm.FlowRecord{
		Kind: smolvm.FlowKind(f.Protocol), Address: f.To.String(), AskedNames: asked,
		SNI: f.Names.SNI, HTTPHost: f.Names.Host, HiddenName: f.Names.Hidden,
	}
	switch {
	case f.Host:
		r.Place = string(ClosedHost)
	case f.VMs:
		r.Place = string(ClosedVMs)
	}
	switch stated := normalNames([]string{f.Names.SNI, withoutPort(f.Names.Host)}); {
	case len(stated) > 0:
		r.Name = stated[0]
	case len(asked) == 1:
		r.Name = asked[0]
	}
	AddVerdict(&r, v)
	return r
}

// AddVerdict notes in a record what a policy says of what is recorded.
func AddVerdict(r *smolvm.FlowRecord, v Verdict) {
	r.Verdict, r.Reason, r.Closed = smolvm.FlowDenied, v.String(), string(v.Closed)
	if v.Allowed {
		r.Verdict, r.Reason, r.Closed = smolvm.FlowAllowed, "", ""
	}
	if v.Number > 0 {
		r.Rule = v.Rule.String()
	}
}
