package manager

import (
	"context"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// CheckPrerequisites looks at what a backend needs of this host, and reports each
// finding, the good ones too; those that keep the backend from working have
// [smolvm.SeverityError]. An empty backend stands for the Manager's own, "auto" for the
// first that can run VMs here, or, if none can, for the one that is preferred.
func (m *Manager) CheckPrerequisites(ctx context.Context, backend string) ([]smolvm.Finding, error) {
	if backend == "" || backend == traits.Auto {
		backend = m.Backend()
	}
	declared, err := m.backendOf(ctx, backend)
	if err != nil {
		return nil, err
	}
	needed := requirementsOf(declared)
	needed.DataDir = m.dataDir
	needed.CopiesDisks = declared.DiskFormats[0] == disk.Raw
	if declared.Namespaces {
		// A program that is not there is another's finding: each start says so.
		needed.Launcher, _ = m.shimCommand()
	}
	return m.host.Check(ctx, needed), nil
}

// clientSigner is the data directory's key.
func (m *Manager) clientSigner() (ssh.Signer, error) {
	return identity.ClientKey(m.dir.Keys())
}
