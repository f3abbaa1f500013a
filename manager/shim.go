package manager

import (
	"crypto/rand"
	"encoding/hex"

	"github.com/smolvm/smolvm/internal/teardown"
)

// newRun makes a name for one run of a VM, by which the end of that run is told
// from the end of any other.
func newRun() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

// site is what the deletion of a VM needs, in shims too.
func (m *Manager) site() *teardown.Site {
	return &teardown.Site{Dir: m.dir, Store: m.store, Disks: m.disks, Actor: m.actor}
}
