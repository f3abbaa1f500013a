package process

import (
	"fmt"
	"sync"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flowlog"
	"github.com/smolvm/smolvm/internal/network"
)

// beginFlows begins to record what the guest has to do with the outside, for the VM of the spec. What
// it returns ends that, once all that could be recorded has ended.
func (s *process) beginFlows() (end func()) {
	if s.spec.FlowLog == "" {
		return func() {}
	}
	log := flowlog.New(s.spec.FlowLog, func(err error) {
		s.log.Warn("the flow log can't be written; the VM goes on without", "vm", s.spec.ID, "error", err)
	})
	start := smolvm.FlowRecord{Kind: smolvm.FlowStart, Run: s.spec.Run}
	if s.spec.Network != nil && s.spec.Network.Egress != nil {
		addPolicy(&start, *s.spec.Network.Egress)
	}
	log.Record(start)
	s.flows.SetRecorder(log)
	return sync.OnceFunc(func() {
		s.calls.end()
		log.Record(smolvm.FlowRecord{Kind: smolvm.FlowStop, Run: s.spec.Run})
		if err := log.Close(); err != nil {
			s.log.Warn("end the flow log", "vm", s.spec.ID, "error", err)
		}
	})
}

// addPolicy adds to a record which policy is in force from then on.
func addPolicy(r *smolvm.FlowRecord, egress network.Egress) {
	r.EgressRevision = egress.Revision
	r.Detail = fmt.Sprintf("egress policy: default %s, %d rules", egress.Policy.Default, len(egress.Policy.Rules))
}

// recorded has a network tell what the guest does by it.
func (s *process) recorded(attached network.Attachment) network.Attachment {
	if r, ok := attached.(network.Recorded); ok {
		r.SetRecorder(&s.flows)
	}
	return attached
}

// recordForward records that a connection comes to a port of the guest: by a port forward from an
// address, or by smolvm itself.
func (s *process) recordForward(from string, guestPort int) {
	s.flows.Record(smolvm.FlowRecord{Kind: smolvm.FlowForward, Address: from, Port: guestPort})
}
