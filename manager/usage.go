package manager

import (
	"context"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
)

// Usage returns what a VM that runs has taken of the host since its VMM was started.
func (m *Manager) Usage(ctx context.Context, id string) (smolvm.Usage, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return smolvm.Usage{}, err
	}
	if !vm.State.Alive() {
		return smolvm.Usage{}, stateError("measure", vm)
	}
	usage, err := shim.NewClient(m.runtimeDir(id)).Usage(ctx)
	return usage, vmError("measure", id, err)
}
