package manager

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/vmm"
)

// However many starts there are in however many processes, only so many go on at a time, and
// none waits for ever for one that does not end.
func TestStartTurns(t *testing.T) {
	dir := t.TempDir()
	open := func() *Manager {
		m, err := Open(t.Context(), Config{DataDir: dir, SocketDir: dir, MaxStarts: 2})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = m.Close() })
		return m
	}
	managers := []*Manager{open(), open()} // as in two processes
	var now, most atomic.Int32
	var starts sync.WaitGroup
	for i := range 50 {
		starts.Go(func() {
			end, err := managers[i%2].startTurn(t.Context(), vmm.TCG)
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
		if _, err := managers[0].startTurn(t.Context(), vmm.KVM); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range managers {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := m.startTurn(ctx, vmm.KVM)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a wait that was given up: %v", err)
		}
	}
	began := time.Now()
	end, err := managers[1].startTurn(t.Context(), vmm.KVM)
	if err != nil {
		t.Fatal(err)
	}
	end()
	if took := time.Since(began); took < turnTime/2 {
		t.Errorf("a start had its turn after %s, beside two that are under way", took)
	}
}
