package manager

import (
	"context"
	"iter"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flowlog"
	"github.com/smolvm/smolvm/internal/network/learn"
	"github.com/smolvm/smolvm/internal/proc"
)

// Flows yields the records of a VM's flow log, the oldest first: names that its guest asked for,
// connections, commands and copies, of all of its runs, or the end of it; some forty thousand are
// kept. An error is the last that it yields. It matches [smolvm.ErrFlowLogChanged] if a line is
// not as it was written.
func (m *Manager) Flows(ctx context.Context, id string, opts smolvm.FlowOptions) iter.Seq2[smolvm.FlowRecord, error] {
	return func(yield func(smolvm.FlowRecord, error) bool) {
		err := m.eachFlow(ctx, id, opts, func(r smolvm.FlowRecord) bool { return yield(r, nil) })
		if err != nil {
			yield(smolvm.FlowRecord{}, vmError("read the flow log of", id, err))
		}
	}
}

// eachFlow calls each for the records of a VM's flow log, until it returns false.
func (m *Manager) eachFlow(ctx context.Context, id string, opts smolvm.FlowOptions, each func(smolvm.FlowRecord) bool) error {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return err
	}
	opts.Follow = opts.Follow && vm.State.Alive()
	ended := func(ctx context.Context) error { return proc.Wait(ctx, vm.ShimPID, vm.ShimStart) }
	return flowlog.Read(ctx, m.dir.Flows(id), opts, ended, each)
}

// LearnEgress returns the smallest policy that allows the connections that are in a VM's flow log:
// by name where the guest had asked for one, else by address. The policy is not set. The error
// matches [smolvm.ErrFlowLogChanged] if the log is not as it was written.
func (m *Manager) LearnEgress(ctx context.Context, id string, opts smolvm.LearnOptions) (smolvm.LearnedEgress, error) {
	learner := learn.New(opts)
	err := m.eachFlow(ctx, id, smolvm.FlowOptions{}, func(r smolvm.FlowRecord) bool {
		learner.Add(r)
		return true
	})
	if err != nil {
		return smolvm.LearnedEgress{}, vmError("learn an egress policy from the flow log of", id, err)
	}
	return learner.Policy(), nil
}
