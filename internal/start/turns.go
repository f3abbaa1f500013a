package start

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/flock"
)

// turnsName is the directory in the cache with a file for each start that may be under way.
const turnsName = "starts"

// turnTime is how long a start has its turn to itself: several times what one takes. After
// that the next one begins beside it, so that guests that never become ready keep nobody
// from starting.
const turnTime = 5 * time.Second

// Turns bounds how many starts go on at once in a data directory, however many processes
// begin them: the time that each VM has to become ready would be over for all of them
// otherwise.
type Turns struct {
	dir string
	// here has an element for each start that this process has under way.
	here chan struct{}
	// limit is how long a start has its turn to itself, where there is hardware
	// virtualization.
	limit time.Duration
}

// NewTurns returns the turns of a data directory of which count may be taken at once.
func NewTurns(dir *datadir.Dir, count int) *Turns {
	return &Turns{dir: filepath.Join(dir.Cache(), turnsName), here: make(chan struct{}, count), limit: turnTime}
}

// Take waits until the start of a VM may begin, on an accelerator of some slowness; see
// [host.Accelerator]. What it returns ends the turn.
func (t *Turns) Take(ctx context.Context, slowness float64) (func(), error) {
	select {
	case t.here <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for other starts: %w", context.Cause(ctx))
	}
	file, err := t.lock(ctx)
	if err != nil {
		<-t.here
		return nil, fmt.Errorf("wait for other starts: %w", err)
	}
	limit := time.Duration(slowness * float64(t.limit))
	end := sync.OnceFunc(func() {
		_ = file.Close()
		<-t.here
	})
	timer := time.AfterFunc(limit, end)
	return func() {
		timer.Stop()
		end()
	}, nil
}

// lock locks one of the files that stand for the starts of all processes.
func (t *Turns) lock(ctx context.Context) (*os.File, error) {
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return nil, err
	}
	count := cap(t.here)
	first := rand.IntN(count) // most likely a free one
	for n := range count {
		file, err := os.OpenFile(filepath.Join(t.dir, strconv.Itoa((first+n)%count)), os.O_CREATE|os.O_RDWR, 0o600)
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
