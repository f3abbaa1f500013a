package kvmtest

import (
	"context"
	"fmt"
	"time"
)

// watched returns a context that ends, with the reason as its cause, when a machine has not
// answered: it is asked at intervals, and has so long for each answer. Stop ends the watch, and
// returns when nothing is asked any more.
func watched(ctx context.Context, every, limit time.Duration, ask func(context.Context) error) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	over := make(chan struct{})
	go func() {
		defer close(over)
		turn := time.NewTicker(every)
		defer turn.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-turn.C:
			}
			asked, done := context.WithTimeout(ctx, limit)
			err := ask(asked)
			done()
			if err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("the outer machine does not answer any more: %w", err))
				return
			}
		}
	}()
	return ctx, func() {
		cancel(context.Canceled)
		<-over
	}
}
