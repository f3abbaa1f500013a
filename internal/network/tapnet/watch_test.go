package tapnet

import (
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network/nettest"
)

// records keeps what it is told.
type records struct {
	mu   sync.Mutex // guards the following
	next int64
	all  []smolvm.FlowRecord
}

func (r *records) NextFlow() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next++
	return r.next
}

func (r *records) Record(record smolvm.FlowRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, record)
}

// Connections that the kernel carries are recorded from their beginning to their end, by both
// versions of IP, with the bytes that have passed; of each guest its own, and no question for a
// name.
func TestCarriedByKernelIsRecorded(t *testing.T) {
	if !nettest.InOwnNetwork(t) {
		return
	}
	newOutside(t)
	n, other := newNetwork(t, 2, nil), newNetwork(t, 3, nil)
	var got, gotOfOther records
	n.SetRecorder(&got)
	other.SetRecorder(&gotOfOther)
	g, beside := newGuest(t, n), newGuest(t, other)
	for _, protocol := range []string{"tcp", "udp"} {
		mustReach(t, g, protocol, farAddr, hostAddr)
		mustReach(t, g, protocol, farAddr6, hostAddr6)
	}
	mustResolve(t, g)
	mustReach(t, beside, "udp", farAddr, hostAddr)
	must(t, n.Close())
	must(t, other.Close())
	echo := func(addr string) string { return net.JoinHostPort(addr, "7") }
	for _, want := range []struct {
		kind smolvm.FlowKind
		to   string
	}{
		{smolvm.FlowTCP, echo(farAddr)}, {smolvm.FlowTCP, echo(farAddr6)},
		{smolvm.FlowUDP, echo(farAddr)}, {smolvm.FlowUDP, echo(farAddr6)},
	} {
		of := func(event smolvm.FlowEvent) func(smolvm.FlowRecord) bool {
			return func(r smolvm.FlowRecord) bool { return r.Kind == want.kind && r.Address == want.to && r.Event == event }
		}
		open, closed := slices.IndexFunc(got.all, of(smolvm.FlowOpen)), slices.IndexFunc(got.all, of(smolvm.FlowClose))
		if open < 0 || closed < open || got.all[open].Flow != got.all[closed].Flow || got.all[open].Verdict != smolvm.FlowAllowed {
			t.Errorf("%s to %s: its beginning is record %d, its end %d, of %+v", want.kind, want.to, open, closed, got.all)
			continue
		}
		if r := got.all[closed]; r.SentBytes == 0 || r.ReceivedBytes == 0 || r.Duration <= 0 || r.Duration > patience {
			t.Errorf("%s to %s has ended with %+v", want.kind, want.to, r)
		}
	}
	flows := func(r *records) (opened int) {
		for _, record := range r.all {
			if record.Event == smolvm.FlowOpen {
				opened++
			}
		}
		return opened
	}
	if flows(&got) != 4 || flows(&gotOfOther) != 1 {
		t.Errorf("of one guest %d connections are recorded, want 4, and of the other %d, want 1: %+v", flows(&got), flows(&gotOfOther), got.all)
	}
}
