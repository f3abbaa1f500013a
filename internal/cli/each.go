package cli

import (
	"errors"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"
)

// eachOf does something to several VMs or images, as many at a time as there are CPUs, and then
// shows what came of each in the order of the command line. One that fails does not
// keep the others from being done.
func eachOf[T any](ids []string, do func(id string) (T, error), show func(T) error) error {
	ids = distinct(ids)
	results, errs := make([]T, len(ids)), make([]error, len(ids))
	var work errgroup.Group
	work.SetLimit(runtime.NumCPU())
	for i, id := range ids {
		work.Go(func() error {
			results[i], errs[i] = do(id)
			return nil
		})
	}
	_ = work.Wait() // errors are in errs
	for i := range ids {
		if errs[i] == nil {
			errs[i] = show(results[i])
		}
	}
	return errors.Join(errs...)
}

// distinct drops what came before.
func distinct(list []string) []string {
	var kept []string
	for _, s := range list {
		if !slices.Contains(kept, s) {
			kept = append(kept, s)
		}
	}
	return kept
}
