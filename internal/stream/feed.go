package stream

import (
	"context"
	"errors"
	"io"
)

// errFed is what a writer gets when nobody reads any more.
var errFed = errors.New("nobody reads it any more")

// Feed connects write, which runs in a goroutine of its own, to read by a pipe, and returns when both
// have ended: with the error of write, unless read failed before with one of its own. The context of
// write is done when read has failed.
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
