// Package flock locks files between processes. The kernel frees a lock when its
// holder dies, so none is ever stale.
package flock

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLocked says that somebody else holds the lock.
var ErrLocked = errors.New("file is locked by somebody else")

// Lock waits until nobody else holds the lock on file, which it then closes when it
// fails or ctx is done. The lock lasts until the file is closed.
func Lock(ctx context.Context, file *os.File) error {
	if TryLock(file) == nil {
		return nil
	}
	locked := make(chan error, 1)
	go func() { locked <- wait(file) }()
	select {
	case err := <-locked:
		if err != nil {
			return errors.Join(err, file.Close())
		}
		return nil
	case <-ctx.Done():
		// The kernel's waiting can't be called off. When the turn comes, it is
		// passed on at once.
		go func() { _ = errors.Join(<-locked, file.Close()) }()
		return context.Cause(ctx)
	}
}

func wait(file *os.File) error {
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// TryLock takes the lock if it is free; otherwise it returns [ErrLocked].
func TryLock(file *os.File) error {
	err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrLocked
	}
	return err
}
