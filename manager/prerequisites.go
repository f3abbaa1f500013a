package manager

import (
	"context"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/host"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/vmm"
)

// CheckPrerequisites looks at what a backend needs of this host, and reports each
// finding, the good ones too; those that keep the backend from working have
// [smolvm.SeverityError]. An empty backend stands for the Manager's own.
func (m *Manager) CheckPrerequisites(ctx context.Context, backend string) ([]smolvm.Finding, error) {
	traits, err := m.backendOf(backend)
	if err != nil {
		return nil, err
	}
	requirements := requirementsOf(traits)
	requirements.DataDir = m.dataDir
	return m.host.Check(ctx, requirements), nil
}

// Backends lists the backends that are known, the usual one first, and whether each has what
// it needs of this host.
func (m *Manager) Backends(ctx context.Context) ([]smolvm.BackendInfo, error) {
	var backends []smolvm.BackendInfo
	for _, traits := range vmm.Known() {
		info := smolvm.BackendInfo{Name: traits.Name, Available: true}
		findings, err := m.CheckPrerequisites(ctx, traits.Name)
		if err != nil {
			return nil, err
		}
		for _, finding := range findings {
			if finding.Severity == smolvm.SeverityError {
				info.Available = false
				info.Why = strings.TrimPrefix(info.Why+"; "+finding.String(), "; ")
			}
		}
		backends = append(backends, info)
	}
	return backends, nil
}

// requireBackend fails with a [*smolvm.PrerequisiteError] if the VMM's own program
// is missing, before anything is made for a start. It looks for nothing else: the
// full check costs more than it saves here.
func (m *Manager) requireBackend(ctx context.Context, name string) error {
	traits, err := m.backendOf(name)
	if err != nil {
		return err
	}
	if host.HasPrograms(requirementsOf(traits).Programs) {
		return nil
	}
	findings := m.host.Check(ctx, requirementsOf(traits))
	findings = slices.DeleteFunc(findings, func(f smolvm.Finding) bool { return f.Severity != smolvm.SeverityError })
	if len(findings) == 0 {
		return nil
	}
	return &smolvm.PrerequisiteError{Backend: traits.Name, Findings: findings}
}

func requirementsOf(traits vmm.Traits) host.Requirements {
	requirements := host.Requirements{Backend: traits.Name}
	for _, program := range traits.Programs {
		requirements.Programs = append(requirements.Programs, host.Program(program))
	}
	return requirements
}

// clientSigner is the data directory's key.
func (m *Manager) clientSigner() (ssh.Signer, error) {
	return identity.ClientKey(m.dir.Keys())
}
