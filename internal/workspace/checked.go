package workspace

import (
	"context"
	"errors"
	"io"

	"github.com/smolvm/smolvm/internal/image/ocilayer"
)

// Checked passes an archive of a guest's on to out, as send writes it, and fails at the first
// that no image may hold, or that is beyond the limits. Nothing of send runs any more then.
func Checked(ctx context.Context, out io.Writer, limits ocilayer.Limits, send func(ctx context.Context, out io.Writer) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	read, write := io.Pipe()
	checked := make(chan error, 1)
	go func() {
		err := ocilayer.Check(ctx, io.TeeReader(read, out), limits)
		if err != nil {
			cancel(err) // which ends send
		}
		_ = read.CloseWithError(errors.Join(err, io.ErrClosedPipe))
		checked <- err
	}()
	sendErr := send(ctx, write)
	// An error of the sender's own, not one that it got from the pipe.
	_ = write.CloseWithError(sendErr)
	checkErr := <-checked
	if checkErr != nil && !errors.Is(checkErr, sendErr) {
		return checkErr
	}
	return errors.Join(sendErr)
}
