package manager

import (
	"context"
	"fmt"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
)

// maxPool bounds a pool; a VM of the usual kind takes some 50 MB while it is ready.
const maxPool = 256

// poolConfig returns the configuration of the VMs of a pool.
func poolConfig(o smolvm.PoolOptions) smolvm.VMConfig {
	return smolvm.VMConfig{
		ID: smolvm.NewID(), Image: o.Image, VCPUs: o.VCPUs, MemoryMiB: o.MemoryMiB, DiskSizeMiB: o.DiskSizeMiB, WarmUp: o.WarmUp,
		Network: kindOfNetwork(o.Network),
	}.WithDefaults()
}

// SetPool keeps VMs of some kind ready, until [Manager.RemovePool]: a start of such a VM
// takes one of them, and has the next one made. It returns when all are ready, and those that
// a larger pool of the kind had are gone. Each takes the memory of an idle VM.
func (m *Manager) SetPool(ctx context.Context, opts smolvm.PoolOptions) (smolvm.Pool, error) {
	id, err := m.definePool(ctx, opts)
	if err == nil {
		step.Reached(ctx, "pool/defined")
		_, err = m.runTask(ctx, task{Pool: id}, nil)
	}
	if err != nil {
		return smolvm.Pool{}, fmt.Errorf("fill pool: %w", err)
	}
	return m.pools.Info(ctx, id)
}

// EnsurePool is [Manager.SetPool] that returns as soon as it is written down what pool there
// is to be; its VMs are made in the background. [smolvm.Pool].Ready tells how many are there.
func (m *Manager) EnsurePool(ctx context.Context, opts smolvm.PoolOptions) (smolvm.Pool, error) {
	id, err := m.definePool(ctx, opts)
	if err == nil && len(m.pools.Slots(id)) != opts.Size {
		err = m.startTaskAside(task{Pool: id}, nil)
	}
	if err != nil {
		return smolvm.Pool{}, fmt.Errorf("ensure pool: %w", err)
	}
	return m.pools.Info(ctx, id)
}

// definePool writes down what pool there is to be.
func (m *Manager) definePool(ctx context.Context, opts smolvm.PoolOptions) (string, error) {
	if opts.Size < 1 || opts.Size > maxPool {
		return "", &smolvm.ValidationError{Fields: []smolvm.FieldError{{Field: "size", Problem: fmt.Sprintf("%d is not between 1 and %d", opts.Size, maxPool)}}}
	}
	config := poolConfig(opts)
	kind, err := m.kindOf(ctx, config, opts.Progress)
	if err != nil {
		return "", err
	}
	config.Image = kind.Image // whatever its name will mean
	return kind.Key(), m.store.Pools().Set(ctx, store.Pool{ID: kind.Key(), Size: opts.Size, Config: config})
}

// Pools lists the pools.
func (m *Manager) Pools(ctx context.Context) ([]smolvm.Pool, error) {
	pools, err := m.pools.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list pools: %w", err)
	}
	return pools, nil
}

// RemovePool ends a pool, and the VMs in it that nobody has claimed. The error matches
// [smolvm.ErrPoolNotFound].
func (m *Manager) RemovePool(ctx context.Context, id string) error { return m.pools.Remove(ctx, id) }
