package kvmtest

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A machine that answers is asked again and again; one that does not ends the context, and is
// given up in time also if it says nothing at all.
func TestWatched(t *testing.T) {
	t.Parallel()
	problem := errors.New("it is not well")
	hangs := func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	for name, test := range map[string]struct {
		then func(context.Context) error // what follows upon two answers
		want error
	}{
		"fails": {func(context.Context) error { return problem }, problem},
		"hangs": {hangs, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			asked := 0
			ctx, stop := watched(t.Context(), time.Millisecond, 10*time.Millisecond, func(ctx context.Context) error {
				if asked++; asked <= 2 {
					return nil
				}
				return test.then(ctx)
			})
			<-ctx.Done()
			stop()
			if cause := context.Cause(ctx); !errors.Is(cause, test.want) || asked != 3 {
				t.Errorf("after %d questions the cause is %v, want %v after 3", asked, cause, test.want)
			}
		})
	}
	t.Run("is stopped", func(t *testing.T) {
		t.Parallel()
		asked := make(chan struct{}, 1)
		ctx, stop := watched(t.Context(), time.Millisecond, time.Minute, func(ctx context.Context) error {
			select {
			case asked <- struct{}{}:
			default:
			}
			return hangs(ctx)
		})
		<-asked
		stop() // which returns though an answer is due
		if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
			t.Errorf("the cause is %v", cause)
		}
	})
}
