package workspace

import (
	"context"
	"io"

	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/stream"
)

// Checked passes on to out the archive of a guest's that send writes. It fails at the first entry that
// no image may hold, or that is beyond the limits, and returns when send has ended.
func Checked(ctx context.Context, out io.Writer, limits ocilayer.Limits, send func(ctx context.Context, out io.Writer) error) error {
	return stream.Feed(ctx, send, func(r io.Reader) error { return ocilayer.Check(ctx, io.TeeReader(r, out), limits) })
}
