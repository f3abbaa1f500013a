package workspace

import (
	"context"
	"io"

	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/stream"
)

// Checked passes an archive of a guest's on to out, as send writes it, and fails at the first
// that no image may hold, or that is beyond the limits. Nothing of send runs any more then.
func Checked(ctx context.Context, out io.Writer, limits ocilayer.Limits, send func(ctx context.Context, out io.Writer) error) error {
	return stream.Feed(ctx, send, func(r io.Reader) error { return ocilayer.Check(ctx, io.TeeReader(r, out), limits) })
}
