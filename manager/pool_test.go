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
	"github.com/smolvm/smolvm/manager"
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

// A pool that is set to a smaller size gives up the VMs that it has too many.
func TestSmallerPool(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*manager.Manager, smolvm.PoolOptions) (smolvm.Pool, error){
		"set": func(m *manager.Manager, opts smolvm.PoolOptions) (smolvm.Pool, error) {
			return m.SetPool(t.Context(), opts)
		},
		"ensured": func(m *manager.Manager, opts smolvm.PoolOptions) (smolvm.Pool, error) {
			return m.EnsurePool(t.Context(), opts)
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := openFakeFast(t)
			pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 3})
			if err != nil || pool.Ready != 3 {
				t.Fatalf("pool is %+v, %v", pool, err)
			}
			if pool, err = set(m, smolvm.PoolOptions{Size: 1}); err != nil || pool.Size != 1 {
				t.Fatalf("pool is %+v, %v", pool, err)
			}
			for pool.Ready != 1 { // the test's time bounds it
				if name == "set" || pool.Ready < 1 {
					t.Fatalf("pool is %+v", pool)
				}
				time.Sleep(time.Millisecond)
				pools, err := m.Pools(t.Context())
				if err != nil || len(pools) != 1 {
					t.Fatalf("pools are %+v, %v", pools, err)
				}
				pool = pools[0]
			}
			startReport(t, mustRun(t, m, smolvm.VMConfig{}), smolvm.StartPool)
			if err := m.RemovePool(t.Context(), pool.ID); err != nil {
				t.Error(err)
			}
		})
	}
}
