package store

import (
	"context"
	"database/sql"
	"fmt"
)

// chooseLease returns the lowest lease that no VM has.
func chooseLease(ctx context.Context, tx *sql.Tx, leases Range) (int, error) {
	lease, err := lowestFree(ctx, tx, "vms", "lease", "true", leases.First)
	if err == nil && lease > leases.Last {
		err = fmt.Errorf("%w: all leases from %d to %d are taken; delete VMs that are not needed",
			ErrNoneFree, leases.First, leases.Last)
	}
	return lease, err
}

// lowestFree returns the lowest value, not below from, that an integer column does not have
// among the rows that meet a condition. The column must be unique among them: a range of
// values without a gap has as many rows as values, so the search halves the range until the
// gap is found. To count rows is much cheaper than to read them one by one.
func lowestFree(ctx context.Context, tx *sql.Tx, table, column, condition string, from int) (int, error) {
	var highest, count int
	err := tx.QueryRowContext(ctx, fmt.Sprintf("SELECT coalesce(max(%s), 0), count(*) FROM %s WHERE %s AND %s >= ?", column, table, condition, column), from).
		Scan(&highest, &count)
	if err != nil {
		return 0, err
	}
	if count == max(highest+1-from, 0) { // most of the time there is no gap
		return from + count, nil
	}
	// Parsing it takes longer than running it.
	counting, err := tx.PrepareContext(ctx, fmt.Sprintf("SELECT count(*) FROM %s WHERE %s AND %s BETWEEN ? AND ?", table, condition, column))
	if err != nil {
		return 0, err
	}
	defer func() { _ = counting.Close() }()
	low, high := from, highest+1 // all from low down are taken, and high is free
	for low < high {
		middle := low + (high-low)/2
		var taken int
		if err := counting.QueryRowContext(ctx, low, middle).Scan(&taken); err != nil {
			return 0, err
		}
		if taken == middle-low+1 {
			low = middle + 1
		} else {
			high = middle
		}
	}
	return low, nil
}
