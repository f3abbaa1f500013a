package manager

import (
	"context"
	"fmt"
	"strings"

	"github.com/smolvm/smolvm"
)

// reuse returns the VM that has the id of a configuration, if it was created with an equal
// one. A host port that the configuration leaves open equals any.
func (m *Manager) reuse(ctx context.Context, config smolvm.VMConfig) (smolvm.VMInfo, error) {
	vm, err := m.lookup(ctx, config.ID)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	config = config.WithDefaults()
	backend, _, err := m.check(&config)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	config.Backend = backend.Name
	if found, err := m.images.Get(ctx, vm.Image); vm.Image != "" && err == nil {
		if config, err = withImage(config, found); err != nil {
			return smolvm.VMInfo{}, fmt.Errorf("create %q: %w", config.ID, err)
		}
	}
	for i := range min(len(config.PortForwards), len(vm.Config.PortForwards)) {
		if config.PortForwards[i].HostPort == 0 {
			config.PortForwards[i].HostPort = vm.Config.PortForwards[i].HostPort
		}
	}
	for i := range min(len(config.Mounts), len(vm.Config.Mounts)) {
		config.Mounts[i].Since = vm.Config.Mounts[i].Since
	}
	if fields := config.Differences(vm.Config); len(fields) > 0 {
		return smolvm.VMInfo{}, fmt.Errorf("create %q: %w with another configuration: %s differ; choose another id, or delete it first",
			config.ID, smolvm.ErrVMAlreadyExists, strings.Join(fields, ", "))
	}
	return m.info(vm), nil
}
