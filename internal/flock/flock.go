// Package flock locks files between processes. The kernel frees a lock when its
// holder dies, so none is ever stale.
package flock

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked reports that somebody else holds the lock.
var ErrLocked = errors.New("file is locked by somebody else")

// A lock that is held is tried again at intervals that grow from the first to the last: to
// wait in the kernel would take a thread, and could not be called off.
const firstWait, lastWait = 200 * time.Microsecond, 20 * time.Millisecond

// Lock waits until nobody else holds the lock on file, which it then closes when it
// fails or ctx is done. The lock lasts until the file is closed. Those who wait get it in no
// certain order; see [Queue].
func Lock(ctx context.Context, file *os.File) error { return lock(ctx, file, unix.LOCK_EX) }

// At waits like [Lock] for the lock of the file at path, which is made if it is missing.
func At(ctx context.Context, path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := Lock(ctx, file); err != nil {
		return nil, err
	}
	return func() { _ = file.Close() }, nil
}

// LockShared is [Lock], but for those who don't mind each other: it waits only for who holds
// the lock alone, and who wants that waits for all of them.
func LockShared(ctx context.Context, file *os.File) error { return lock(ctx, file, unix.LOCK_SH) }

func lock(ctx context.Context, file *os.File, how int) error {
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		err := try(file, how)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ErrLocked) {
			return errors.Join(err, file.Close())
		}
		select {
		case <-ctx.Done():
			_ = file.Close()
			return context.Cause(ctx)
		case <-time.After(wait/2 + rand.N(wait)):
		}
	}
}

// TryAt is [At], but takes the lock only if it is free; otherwise the error is [ErrLocked].
func TryAt(path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := TryLock(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return func() { _ = file.Close() }, nil
}

// TryLock takes the lock if it is free; otherwise it returns [ErrLocked].
func TryLock(file *os.File) error { return try(file, unix.LOCK_EX) }

func try(file *os.File, how int) error {
	for {
		err := unix.Flock(int(file.Fd()), how|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EWOULDBLOCK):
			return ErrLocked
		}
		return err
	}
}

// Queue makes those who wait for a lock in this process get it in the order in which they
// came, and at once when another of them lets go: only the first of them looks at the file.
// The zero value is ready to use.
type Queue struct {
	mu    sync.Mutex
	lines map[string]*line
}

// line holds those who have or wait for the lock of one name.
type line struct {
	turn  chan struct{} // has one element while nobody has the turn
	count int
}

// Enter waits for the caller's turn among those with the same name. What is returned gives
// the turn to the next.
func (q *Queue) Enter(ctx context.Context, name string) (leave func(), err error) {
	q.mu.Lock()
	if q.lines == nil {
		q.lines = map[string]*line{}
	}
	l := q.lines[name]
	if l == nil {
		l = &line{turn: make(chan struct{}, 1)}
		l.turn <- struct{}{}
		q.lines[name] = l
	}
	l.count++
	q.mu.Unlock()
	left := func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if l.count--; l.count == 0 {
			delete(q.lines, name)
		}
	}
	select {
	case <-l.turn: // those who wait on a channel are served in their order
		return sync.OnceFunc(func() {
			l.turn <- struct{}{}
			left()
		}), nil
	case <-ctx.Done():
		left()
		return nil, context.Cause(ctx)
	}
}
