package manager

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/host"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

const backendEnv = "SMOLVM_BACKEND"

// resolveBackend returns the name of the backend of VMs that don't name one, by the option
// or the environment; [traits.Auto] if neither has one. What that stands for is found out
// when it is needed: a Manager can be opened on a host that can't run VMs.
func resolveBackend(known traits.List, option string) (string, error) {
	name, from := option, "the Backend option"
	if name == "" {
		name, from = os.Getenv(backendEnv), "$"+backendEnv
	}
	if name == "" || name == traits.Auto {
		return traits.Auto, nil
	}
	if _, err := known.Lookup(name); err != nil {
		return "", fmt.Errorf("%s: %w", from, err)
	}
	return name, nil
}

// Backend is the backend of VMs that don't name one. Where that is "auto" and none of the
// backends can run VMs on this host, it is the one that needs the least of a host.
func (m *Manager) Backend() string {
	backend, err := m.backendOf(context.Background(), "")
	if err != nil {
		return m.known[len(m.known)-1].Name
	}
	return backend.Name
}

// backendOf returns the backend of a VM. An empty name stands for the Manager's own. The
// error matches [smolvm.ErrUnknownBackend], or is a [*smolvm.PrerequisiteError] if the name
// is [traits.Auto] and no backend can run VMs on this host.
func (m *Manager) backendOf(ctx context.Context, name string) (vmm.Traits, error) {
	return m.backendFor(ctx, name, traits.Needs{})
}

// backendFor is backendOf for a VM that needs something of its backend, of which [traits.Auto]
// stands for one that can do it, if any can. One that is named is not asked.
func (m *Manager) backendFor(ctx context.Context, name string, needs traits.Needs) (vmm.Traits, error) {
	if name == "" {
		name = m.backend
	}
	if name != traits.Auto {
		return m.known.Lookup(name)
	}
	able := m.known.Able(needs)
	if len(able) == 0 {
		able = m.known
	}
	// Why one can't be used takes a probe of KVM to say, and nobody asks if another one can.
	if i := slices.IndexFunc(able, func(t vmm.Traits) bool { return m.canRun(ctx, t) }); i >= 0 {
		return able[i], nil
	}
	return able.First(func(t vmm.Traits) []smolvm.Finding { return m.lacks(ctx, t) })
}

// canRun reports whether a backend has what it needs of this host, as [Manager.lacks] does.
func (m *Manager) canRun(ctx context.Context, backend vmm.Traits) bool {
	if !host.HasPrograms(requirementsOf(backend).Programs) {
		return false
	}
	_, found := m.acceleratorOf(ctx, backend)
	return found
}

// lacks returns what keeps a backend from running VMs on this host: a program that is not
// there, or accelerators none of which is. It runs no program, so it does not know of one
// that is too old: the full check costs more than it saves before a start.
func (m *Manager) lacks(ctx context.Context, backend vmm.Traits) []smolvm.Finding {
	if m.canRun(ctx, backend) {
		return nil
	}
	return slices.DeleteFunc(m.host.Check(ctx, requirementsOf(backend)), func(f smolvm.Finding) bool { return f.Severity != smolvm.SeverityError })
}

// acceleratorOf returns the accelerator that a backend runs VMs on here, if there is one.
func (m *Manager) acceleratorOf(ctx context.Context, backend vmm.Traits) (name string, found bool) {
	return traits.Accelerator(backend, func(name string) bool { return m.host.Has(ctx, name) })
}

// accelerator returns the accelerator of a VM that is run by the named backend.
func (m *Manager) accelerator(ctx context.Context, backend string) (string, error) {
	declared, err := m.backendOf(ctx, backend)
	if err != nil {
		return "", err
	}
	name, found := m.acceleratorOf(ctx, declared)
	if !found {
		return "", &smolvm.PrerequisiteError{Backend: declared.Name, Findings: m.lacks(ctx, declared)}
	}
	return name, nil
}

// requireBackend fails with a [*smolvm.PrerequisiteError] if a backend lacks something,
// before anything is made for a start.
func (m *Manager) requireBackend(ctx context.Context, name string) error {
	backend, err := m.backendOf(ctx, name)
	if err != nil {
		return err
	}
	if missing := m.lacks(ctx, backend); len(missing) > 0 {
		return &smolvm.PrerequisiteError{Backend: backend.Name, Findings: missing}
	}
	return nil
}

// Backends lists the backends that are known, in the order in which "auto" prefers them, and
// whether each has what it needs of this host.
func (m *Manager) Backends(ctx context.Context) ([]smolvm.BackendInfo, error) {
	var backends []smolvm.BackendInfo
	for _, backend := range m.known {
		info := smolvm.BackendInfo{Name: backend.Name, Available: true}
		findings, err := m.CheckPrerequisites(ctx, backend.Name)
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

func requirementsOf(backend vmm.Traits) host.Requirements {
	needed := host.Requirements{Backend: backend.Name, Accelerators: backend.Accelerators}
	for _, program := range backend.Programs {
		needed.Programs = append(needed.Programs, host.Program(program))
	}
	return needed
}
