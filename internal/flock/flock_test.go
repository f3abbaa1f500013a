package flock

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
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
