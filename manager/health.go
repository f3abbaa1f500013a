package manager

import (
	"context"
	"fmt"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
)

// healthTime bounds how long a shim may take to say what is known of its guest's health.
const healthTime = time.Second

// WaitHealthy returns when the checks of a VM's health have found that it works. The error
// matches [smolvm.ErrUnhealthy] if they find that it does not, and [smolvm.ErrInvalidState] if the
// VM does not run, or ends meanwhile, or no checks are made.
func (m *Manager) WaitHealthy(ctx context.Context, id string) (smolvm.VMInfo, error) {
	const verb = "wait for the health of"
	changes, err := m.watchDatabase(ctx)
	if err != nil {
		return smolvm.VMInfo{}, vmError(verb, id, err)
	}
	defer changes.close()
	var gone string // the run whose shim has ended
	for {
		vm, err := m.lookup(ctx, id)
		switch {
		case err != nil:
			return smolvm.VMInfo{}, err
		case vm.Config.Healthcheck == nil:
			return smolvm.VMInfo{}, &smolvm.Error{Op: verb, Kind: "VM", ID: id,
				Hint: "create it with --health-cmd, or of an image with a HEALTHCHECK",
				Err:  fmt.Errorf("%w: it has no health check", smolvm.ErrInvalidState)}
		case !vm.State.Alive():
			return smolvm.VMInfo{}, stateError(verb, vm)
		}
		info := m.withHealth(ctx, m.info(vm), vm)
		if found := info.Health; found != nil {
			switch found.Status {
			case smolvm.HealthHealthy:
				return info, nil
			case smolvm.HealthStarting: // and so it is waited for
			case smolvm.HealthUnhealthy:
				return info, vmError(verb, id, fmt.Errorf("%w: %s", smolvm.ErrUnhealthy, found.Reason()))
			}
		}
		// The shim writes an event down for each change.
		if err := changes.waitBeside(ctx, awaitShim(vm, &gone)); err != nil {
			return smolvm.VMInfo{}, vmError(verb, id, err)
		}
	}
}

// withHealth adds to what is known of a VM what the checks of its health have found, which its
// shim knows.
func (m *Manager) withHealth(ctx context.Context, info smolvm.VMInfo, vm store.VM) smolvm.VMInfo {
	if !vm.State.Alive() || vm.Config.Healthcheck == nil {
		return info
	}
	ctx, cancel := context.WithTimeout(ctx, healthTime)
	defer cancel()
	status, err := shim.NewClient(m.runtimeDir(vm.ID)).Status(ctx)
	if err == nil && status.Run == vm.Run { // else it has ended, or says nothing: nothing is known
		info.Health = status.Health
	}
	return info
}
