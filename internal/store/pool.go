package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/smolvm/smolvm"
)

// Pool is a number of VMs to be kept ready.
type Pool struct {
	ID     string
	Size   int
	Config smolvm.VMConfig
}

// Pools are the records of the pools.
type Pools struct{ s *Store }

// Pools returns the records of the pools.
func (s *Store) Pools() Pools { return Pools{s} }

// Set makes or changes a pool.
func (p Pools) Set(ctx context.Context, pool Pool) error {
	config, err := json.Marshal(pool.Config)
	if err != nil {
		return err
	}
	return p.s.update(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO pools (id, size, config) VALUES (?, ?, ?)
			ON CONFLICT (id) DO UPDATE SET size = excluded.size, config = excluded.config`, pool.ID, pool.Size, string(config))
		return err
	})
}

// Get reads a pool. The error matches [smolvm.ErrPoolNotFound].
func (p Pools) Get(ctx context.Context, id string) (Pool, error) {
	pools, err := p.query(ctx, "WHERE id = ?", id)
	if err == nil && len(pools) == 0 {
		err = fmt.Errorf("%w: %q", smolvm.ErrPoolNotFound, id)
	}
	if err != nil {
		return Pool{}, err
	}
	return pools[0], nil
}

// List lists the pools.
func (p Pools) List(ctx context.Context) ([]Pool, error) { return p.query(ctx, "ORDER BY id") }

func (p Pools) query(ctx context.Context, clause string, args ...any) ([]Pool, error) {
	var pools []Pool
	err := p.s.view(ctx, func(tx *sql.Tx) (err error) {
		rows, err := tx.QueryContext(ctx, "SELECT id, size, config FROM pools "+clause, args...)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, rows.Close()) }()
		for rows.Next() {
			var pool Pool
			var config string
			if err := rows.Scan(&pool.ID, &pool.Size, &config); err != nil {
				return err
			}
			if err := json.Unmarshal([]byte(config), &pool.Config); err != nil {
				return fmt.Errorf("pool %q: %w", pool.ID, err)
			}
			pools = append(pools, pool)
		}
		return rows.Err()
	})
	return pools, err
}

// Delete removes a pool; one that is not there is fine.
func (p Pools) Delete(ctx context.Context, id string) error {
	return p.s.update(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM pools WHERE id = ?", id)
		return err
	})
}
