package manager

import (
	"github.com/smolvm/smolvm/internal/teardown"
)

// site is what the deletion of a VM needs, in shims too.
func (m *Manager) site() *teardown.Site {
	return &teardown.Site{Dir: m.dir, Store: m.store, Disks: m.disks, Actor: m.actor}
}
