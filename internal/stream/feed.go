package stream

import (
	"context"
	"errors"
	"io"
)

// errFed is what a writer gets when nobody reads any more.
var errFed = errors.New("nobody reads it any more")

// Feed has read read what write writes, in a goroutine of its own. It returns when both have ended:
// with the error of write, if there is one that read has not ended with another before. The context
// of write is done when read has failed.
func Feed(ctx context.Context, write func(ctx context.Context, w io.Writer) error, read func(r io.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	from, to := io.Pipe()
	written := make(chan error, 1)
	go func() {
		err := write(ctx, to)
		_ = to.CloseWithError(err)
		written <- err
	}()
	err := read(from)
	if err != nil {
		cancel()
	}
	_ = from.CloseWithError(errFed)
	if writeErr := <-written; writeErr != nil && (err == nil || errors.Is(err, writeErr)) {
		return writeErr
	}
	return err
}
