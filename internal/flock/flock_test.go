package flock

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func open(t *testing.T, path string) *os.File {
	t.Helper()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	holder := open(t, path)
	if err := Lock(t.Context(), holder); err != nil {
		t.Fatal(err)
	}
	other := open(t, path)
	if err := TryLock(other); !errors.Is(err, ErrLocked) {
		t.Errorf("a lock that is held can be taken: %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	waiting := make(chan error, 1)
	go func() { waiting <- Lock(cancelled, other) }()
	cancel()
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Errorf("a wait that was called off: %v", err)
	}
	// The next one gets it when the holder lets go, whatever became of the other.
	next := open(t, path)
	defer func() { _ = next.Close() }()
	go func() { waiting <- Lock(t.Context(), next) }()
	if err := holder.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; err != nil {
		t.Errorf("after the holder let go: %v", err)
	}
}

// Waits that are given up leave neither files nor threads (C6).
func TestLockGivenUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	holder := open(t, path)
	if err := Lock(t.Context(), holder); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Close() }()
	count := func(dir string) int {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	files, threads := count("/proc/self/fd"), count("/proc/self/task")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var waits sync.WaitGroup
	for range 200 {
		file := open(t, path)
		waits.Go(func() {
			if err := Lock(ctx, file); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a wait that was given up: %v", err)
			}
		})
	}
	waits.Wait()
	if now := count("/proc/self/fd"); now != files {
		t.Errorf("%d files are open, %d were before", now, files)
	}
	if now := count("/proc/self/task"); now > threads+20 { // those of Go's runtime
		t.Errorf("there are %d threads, %d were before", now, threads)
	}
}

// Those who wait in a queue get their turn in the order in which they came.
func TestQueue(t *testing.T) {
	var q Queue
	leave, err := q.Enter(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := q.Enter(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := q.Enter(gone, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("a wait that was called off: %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		var q Queue
		leave, err := q.Enter(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		var order []int
		var mu sync.Mutex
		for i := range 10 {
			go func() {
				leave, err := q.Enter(t.Context(), "a")
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				leave()
			}()
			synctest.Wait()
		}
		leave()
		synctest.Wait()
		if !slices.IsSorted(order) || len(order) != 10 {
			t.Errorf("the order was %v", order)
		}
	})
	leave()
	if len(q.lines) != 0 {
		t.Errorf("lines are left: %v", q.lines)
	}
}

func TestLockShared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, second, alone := open(t, path), open(t, path), open(t, path)
	defer func() { _ = alone.Close() }()
	if err := errors.Join(LockShared(t.Context(), first), LockShared(t.Context(), second)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(first.Close()); err != nil {
		t.Fatal(err)
	}
	if err := TryLock(alone); !errors.Is(err, ErrLocked) {
		t.Errorf("a lock that is shared can be taken alone: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Lock(t.Context(), alone); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := LockShared(ctx, open(t, path)); !errors.Is(err, context.Canceled) {
		t.Errorf("a lock that is held alone can be shared: %v", err)
	}
}
