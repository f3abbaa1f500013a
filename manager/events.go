package manager

import (
	"context"
	"fmt"

	"github.com/smolvm/smolvm"
)

// Events lists what happened to a VM, or to all VMs. Events outlive their VM; the newest
// hundred thousand are kept.
func (m *Manager) Events(ctx context.Context, opts smolvm.EventOptions) ([]smolvm.Event, error) {
	limit := opts.Limit
	if limit <= 0 {
		limit = smolvm.DefaultEventLimit
	}
	events, err := m.store.Events().Newest(ctx, opts.VM, limit)
	if err != nil {
		return nil, fmt.Errorf("list events: %w", err)
	}
	return events, nil
}
