package datadir

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/flock"
)

// VMLock is held by whoever changes a VM: one process at a time, and the kernel
// lets go of it when that process dies. It orders the verbs on one VM; the
// database alone decides what is true.
type VMLock struct{ file *os.File }

// ErrLocked matches the error of [Dir.TryLockVM] if another process holds the lock.
var ErrLocked = errors.New("VM is being changed by another process")

// LockVM waits until no other process holds the lock of a VM, and takes it.
func (d *Dir) LockVM(ctx context.Context, id string) (*VMLock, error) {
	for {
		file, err := d.OpenLock(id)
		if err != nil {
			return nil, fmt.Errorf("lock VM %q: %w", id, err)
		}
		if err := flock.Lock(ctx, file); err != nil {
			return nil, fmt.Errorf("wait for another operation on VM %q: %w", id, err)
		}
		if isCurrent(file) {
			return &VMLock{file}, nil
		}
		_ = file.Close() // the VM was deleted meanwhile, and its lock with it
	}
}

// TryLockVM is [Dir.LockVM] for those who must not wait; the error matches [ErrLocked].
func (d *Dir) TryLockVM(id string) (*VMLock, error) {
	for {
		file, err := d.OpenLock(id)
		if err != nil {
			return nil, fmt.Errorf("lock VM %q: %w", id, err)
		}
		if err := flock.TryLock(file); err != nil {
			_ = file.Close()
			return nil, ErrLocked
		}
		if isCurrent(file) {
			return &VMLock{file}, nil
		}
		_ = file.Close()
	}
}

// OpenLock opens the file of a lock, making it if it is missing.
func (d *Dir) OpenLock(name string) (*os.File, error) {
	return os.OpenFile(d.Lock(name), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, fileMode)
}

// Unlock releases the lock.
func (l *VMLock) Unlock() { _ = l.file.Close() }

// Remove releases the lock and removes its file, as the VM is gone.
func (l *VMLock) Remove() {
	// While the lock is held, so that nobody can hold the file that is removed
	// without finding out in isCurrent.
	_ = os.Remove(l.file.Name())
	l.Unlock()
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

// OwnerLock returns the name of the lock that the creator of an ephemeral VM holds.
func OwnerLock(id string) string { return id + ".owner" }
