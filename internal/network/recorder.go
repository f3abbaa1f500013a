package network

import (
	"slices"

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

// NoRecorder is a [Recorder] that forgets everything.
type NoRecorder struct{}

// NextFlow implements [Recorder].
func (NoRecorder) NextFlow() int64 { return 0 }

// Record implements [Recorder].
func (NoRecorder) Record(smolvm.FlowRecord) {}

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
