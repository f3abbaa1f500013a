package manager

import (
	"context"
)

// reclaimLayers removes the layers that nothing needs any more.
func (m *Manager) reclaimLayers(ctx context.Context) error { return m.disks.Collect(ctx) }
