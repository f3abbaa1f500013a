package start

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/datadir"
)

// However many starts there are in however many processes, only so many go on at a time, and
// none waits for ever for one that does not end.
func TestStartTurns(t *testing.T) {
	t.Parallel()
	dir, err := datadir.Open(datadir.Options{Path: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	const limit = 200 * time.Millisecond                  // so that the test need not wait for long
	turns := []*Turns{NewTurns(dir, 2), NewTurns(dir, 2)} // as in two processes
	for _, one := range turns {
		one.limit = limit
	}
	var now, most atomic.Int32
	var starts sync.WaitGroup
	for i := range 50 {
		starts.Go(func() {
			end, err := turns[i%2].Take(t.Context(), 1)
			if err != nil {
				t.Error(err)
				return
			}
			defer end()
			for n := now.Add(1); n > most.Load(); {
				most.Store(n)
			}
			time.Sleep(time.Millisecond)
			now.Add(-1)
		})
	}
	starts.Wait()
	if most.Load() != 2 {
		t.Errorf("%d starts were under way at once, want 2", most.Load())
	}
	for range 2 { // they do not end
		if _, err := turns[0].Take(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	for _, one := range turns {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err := one.Take(ctx, 1)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a wait that was given up: %v", err)
		}
	}
	began := time.Now()
	end, err := turns[1].Take(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	end()
	if took := time.Since(began); took < limit/2 {
		t.Errorf("a start had its turn after %s, beside two that are under way", took)
	}
}
