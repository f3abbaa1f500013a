package manager

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
)

// ErrNoDataDir says that there is no data directory, and that none was to be made; see
// [Config].Existing.
var ErrNoDataDir = datadir.ErrMissing

// copiedCause is why a VM has stopped that was alive in the data directory of which this
// one is a copy.
const copiedCause = "the data directory was copied, moved to another file system, or restored from a backup " +
	"while the VM ran: its disk is as after a power cut"

// settleDir gives a new or copied data directory an identity of its own. What runs belongs
// to the original of a copy: its VMs are stopped, and it has no VMs that stand by.
func settleDir(ctx context.Context, dir *datadir.Dir, state *store.Store) error {
	if dir.ID() != "" {
		return nil
	}
	former, err := state.FormerRoot(ctx)
	if err != nil {
		return err
	}
	return dir.Settle(ctx, datadir.Arrival{
		Former: former,
		Forget: func() error { return errors.Join(state.ForgetRuns(ctx, copiedCause), emptyDir(dir.Pools())) },
	})
}

func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, entry := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, entry.Name())))
	}
	return err
}

// Note says in a sentence what is unusual about the data directory that is used; empty if
// nothing is. It is for the people who wonder where their VMs are.
func (m *Manager) Note() string { return m.dir.Note() }

// vmDir holds a VM's log files and its known_hosts file.
func (m *Manager) vmDir(id string) string { return m.dir.VM(id) }

func (m *Manager) runtimeDir(id string) string {
	return m.dir.Runtime(m.socketDir, id, len(filepath.Base(shim.AgentSocket(""))))
}
