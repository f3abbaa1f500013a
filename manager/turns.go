package manager

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/vmm"
)

// turnsName is the directory in the cache with a file for each start that may be under way.
const turnsName = "starts"

// turnTime is how long a start has its turn to itself: several times what one takes. After
// that the next one begins beside it, so that guests that never become ready keep nobody
// from starting.
const turnTime = 5 * time.Second

// startTurn waits until the start of a VM may begin: of those in one data directory only so
// many do at a time, as the time that each has to become ready would be over for all of
// them otherwise. What is returned ends the turn.
func (m *Manager) startTurn(ctx context.Context, accelerator string) (func(), error) {
	select {
	case m.starts <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for other starts: %w", context.Cause(ctx))
	}
	file, err := m.takeTurn(ctx)
	if err != nil {
		<-m.starts
		return nil, fmt.Errorf("wait for other starts: %w", err)
	}
	limit := turnTime
	if accelerator != vmm.KVM {
		limit *= emulationFactor
	}
	end := sync.OnceFunc(func() {
		_ = file.Close()
		<-m.starts
	})
	timer := time.AfterFunc(limit, end)
	return func() {
		timer.Stop()
		end()
	}, nil
}

// takeTurn locks one of the files that stand for the starts of all processes.
func (m *Manager) takeTurn(ctx context.Context) (*os.File, error) {
	dir := filepath.Join(m.dir.Cache(), turnsName)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	count := cap(m.starts)
	first := rand.IntN(count) // most likely a free one
	for n := range count {
		file, err := os.OpenFile(filepath.Join(dir, strconv.Itoa((first+n)%count)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		if n == count-1 { // all are taken
			return file, flock.Lock(ctx, file)
		}
		if flock.TryLock(file) == nil {
			return file, nil
		}
		_ = file.Close()
	}
	return nil, os.ErrInvalid // there is at least one
}
