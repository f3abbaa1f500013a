package manager

import (
	"context"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/workspace"
)

// WithBackends has a Manager know backends by other traits than package traits lists.
func WithBackends(config Config, known ...vmm.Traits) Config {
	config.backends = known
	return config
}

// OpenWorkspace gives tests the workspaces of a Manager.
func (m *Manager) OpenWorkspace(ctx context.Context, image smolvm.Image, opts workspace.Options) (*workspace.Workspace, error) {
	return m.openWorkspace(ctx, image, opts)
}

// OCI returns the store of OCI images.
func (m *Manager) OCI() *ocistore.Store { return m.catalog.OCI }
