package vmm

import "context"

// TakeTurn waits until nobody else has the turn, of which a channel with room for one element
// holds one meanwhile, for calls of an [Instance] that must not meet. The error is ended's if the
// VM ends before, and that of the context if that is done.
func TakeTurn(ctx context.Context, turn chan struct{}, done <-chan struct{}, ended error) (release func(), err error) {
	select {
	case turn <- struct{}{}:
		return func() { <-turn }, nil
	case <-done:
		return nil, ended
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
