package tapnet

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/smolvm/smolvm/internal/flock"
)

// lock waits until no other process changes the networks of VMs in this network namespace.
// What is locked is the namespace's own file: it is one for all, whatever directories they
// see, and leaves nothing behind.
func lock(ctx context.Context) (unlock func(), err error) {
	file, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("lock the networks of VMs: %w", err)
	}
	if err := flock.Lock(ctx, file); err != nil {
		return nil, fmt.Errorf("wait for another process that changes the networks of VMs: %w", err)
	}
	return func() { _ = file.Close() }, nil
}

// lockTimeout is far more than those who hold the lock before need.
const lockTimeout = 30 * time.Second

// lockSoon is [lock] for calls that have no context.
func lockSoon() (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(context.Background(), lockTimeout)
	defer cancel()
	return lock(ctx)
}
