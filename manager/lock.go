package manager

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/flock"
)

// vmLock is the lock of a VM, with the turn among those of this process who want it.
type vmLock struct {
	*datadir.VMLock
	leave func() // lets the next one of this process have its turn; may be nil
}

// lock waits until no other operation is under way on the VM.
func (m *Manager) lock(ctx context.Context, id string) (*vmLock, error) {
	leave, err := m.locks.Enter(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("wait for another operation on VM %q: %w", id, err)
	}
	lock, err := m.dir.LockVM(ctx, id)
	if err != nil {
		leave()
		return nil, err
	}
	return &vmLock{lock, leave}, nil
}

// tryLock is lock for those who must not wait; it fails with [datadir.ErrLocked].
func (m *Manager) tryLock(id string) (*vmLock, error) {
	lock, err := m.dir.TryLockVM(id)
	if err != nil {
		return nil, err
	}
	return &vmLock{VMLock: lock}, nil
}

// unlock lets the next one in.
func (l *vmLock) unlock() {
	l.Unlock()
	if l.leave != nil {
		l.leave()
	}
}

// remove unlocks for good: the VM is gone.
func (l *vmLock) remove() {
	l.Remove()
	if l.leave != nil {
		l.leave()
	}
}

// own marks an ephemeral VM as belonging to this process, from its creation on. Once
// it runs its shim knows when the process ends; before that only this lock tells.
func (m *Manager) own(id string) error {
	file, err := m.dir.OpenLock(datadir.OwnerLock(id))
	if err != nil {
		return fmt.Errorf("own VM %q: %w", id, err)
	}
	if err := flock.TryLock(file); err != nil {
		return errors.Join(fmt.Errorf("own VM %q: %w", id, err), file.Close())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return errors.Join(fmt.Errorf("own VM %q: %w", id, os.ErrClosed), file.Close())
	}
	m.owned[id] = file
	return nil
}

// disown removes the mark; the VM is gone.
func (m *Manager) disown(id string) {
	m.mu.Lock()
	file := m.owned[id]
	delete(m.owned, id)
	m.mu.Unlock()
	_ = os.Remove(m.dir.Lock(datadir.OwnerLock(id)))
	if file != nil {
		_ = file.Close()
	}
}

// orphaned reports whether the process that created an ephemeral VM is gone.
func (m *Manager) orphaned(id string) bool {
	file, err := os.Open(m.dir.Lock(datadir.OwnerLock(id)))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	defer func() { _ = file.Close() }()
	return flock.TryLock(file) == nil
}
