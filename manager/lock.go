package manager

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/flock"
)

// vmLock is held by whoever changes a VM: one process at a time, and the kernel
// lets go of it when that process dies. It orders the verbs on one VM; the
// database alone decides what is true.
type vmLock struct {
	file  *os.File
	leave func() // lets the next one of this process have its turn; may be nil
}

var errLocked = errors.New("VM is being changed by another process")

// lock waits until no other operation is under way on the VM.
func (m *Manager) lock(ctx context.Context, id string) (_ *vmLock, err error) {
	leave, err := m.locks.Enter(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("wait for another operation on VM %q: %w", id, err)
	}
	defer func() {
		if err != nil {
			leave()
		}
	}()
	for {
		file, err := m.openLock(id)
		if err != nil {
			return nil, fmt.Errorf("lock VM %q: %w", id, err)
		}
		if err := flock.Lock(ctx, file); err != nil {
			return nil, fmt.Errorf("wait for another operation on VM %q: %w", id, err)
		}
		if isCurrent(file) {
			return &vmLock{file: file, leave: leave}, nil
		}
		_ = file.Close() // the VM was deleted meanwhile, and its lock with it
	}
}

// tryLock is lock for those who must not wait; it fails with errLocked.
func (m *Manager) tryLock(id string) (*vmLock, error) {
	for {
		file, err := m.openLock(id)
		if err != nil {
			return nil, fmt.Errorf("lock VM %q: %w", id, err)
		}
		if err := flock.TryLock(file); err != nil {
			_ = file.Close()
			return nil, errLocked
		}
		if isCurrent(file) {
			return &vmLock{file: file}, nil
		}
		_ = file.Close()
	}
}

func (m *Manager) openLock(id string) (*os.File, error) {
	return os.OpenFile(m.dir.Lock(id), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
}

// unlock lets the next one in.
func (l *vmLock) unlock() {
	_ = l.file.Close()
	if l.leave != nil {
		l.leave()
	}
}

// remove unlocks for good: the VM is gone.
func (l *vmLock) remove() {
	// While the lock is held, so that nobody can hold the file that is removed
	// without finding out in isCurrent.
	_ = os.Remove(l.file.Name())
	l.unlock()
}

// isCurrent reports whether the locked file is still the one at its path.
func isCurrent(file *os.File) bool {
	held, err := file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(file.Name())
	return err == nil && os.SameFile(held, there)
}

// ownerSuffix ends the name of the lock that the creator of an ephemeral VM holds.
const ownerSuffix = ".owner"

// own marks an ephemeral VM as belonging to this process, from its creation on. Once
// it runs its shim knows when the process ends; before that only this lock tells.
func (m *Manager) own(id string) error {
	file, err := m.openLock(id + ownerSuffix)
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
	_ = os.Remove(m.dir.Lock(id + ownerSuffix))
	if file != nil {
		_ = file.Close()
	}
}

// orphaned reports whether the process that created an ephemeral VM is gone.
func (m *Manager) orphaned(id string) bool {
	file, err := os.Open(m.dir.Lock(id + ownerSuffix))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	defer func() { _ = file.Close() }()
	return flock.TryLock(file) == nil
}
