package manager

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
)

// healthTime bounds how long shims may take to say what is known of their guests' health, and
// healthAsked how many are asked at once.
const healthTime, healthAsked = time.Second, 64

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
	if !isChecked(vm) {
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

// addHealth is [Manager.withHealth] for many VMs. Their shims are asked at the same time, so that those
// that don't answer take no longer than one.
func (m *Manager) addHealth(ctx context.Context, infos []smolvm.VMInfo, vms []store.VM) {
	ctx, cancel := context.WithTimeout(ctx, healthTime)
	defer cancel()
	var group errgroup.Group
	group.SetLimit(healthAsked)
	for i, vm := range vms {
		if isChecked(vm) {
			group.Go(func() error {
				infos[i] = m.withHealth(ctx, infos[i], vm)
				return nil
			})
		}
	}
	_ = group.Wait() // none fails
}

// isChecked reports whether checks of a VM's health are made.
func isChecked(vm store.VM) bool { return vm.State.Alive() && vm.Config.Healthcheck != nil }
