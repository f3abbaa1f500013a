package manager

import (
	"context"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/workspace"
)

// openWorkspace starts a VM of an image in which commands run one after the other, and what
// each has changed can be had as a layer.
func (m *Manager) openWorkspace(ctx context.Context, image smolvm.Image, opts workspace.Options) (*workspace.Workspace, error) {
	return workspace.Open(ctx, workspaceVMs{m}, image, opts)
}

// workspaceVMs are the VMs of workspaces; it implements [workspace.VMs].
type workspaceVMs struct{ *Manager }

// Guest implements [workspace.VMs].
func (w workspaceVMs) Guest(ctx context.Context, id string) (workspace.Guest, error) {
	client, err := w.client(ctx, id, "use as a workspace")
	if err != nil {
		return nil, err // of a type that says nothing of a nil client
	}
	return client, nil
}
