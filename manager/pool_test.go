package manager_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
)

// A pool that is removed while it is filled is empty in the end, also if whoever removes it
// does not wait for that.
func TestRemovePoolWhileFilled(t *testing.T) {
	m := openFakeFast(t)
	if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{}); err != nil {
		t.Fatal(err)
	}
	pool, err := m.EnsurePool(t.Context(), smolvm.PoolOptions{Size: 8})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(m.DataDir(), "pool", pool.ID)
	slots := func() int {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return len(entries) - 1 // one is the lock
	}
	for slots() < 1 { // the test's time bounds it
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithCancel(t.Context())
	removed := make(chan error)
	go func() { removed <- m.RemovePool(ctx, pool.ID) }()
	for {
		pools, err := m.Pools(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(pools) == 0 {
			break
		}
	}
	cancel()
	if err := <-removed; err == nil {
		t.Log("it was filled too fast")
	}
	for slots() >= 0 {
		time.Sleep(time.Millisecond)
	}
}
