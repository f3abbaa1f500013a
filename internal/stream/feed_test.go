package stream

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

func TestFeed(t *testing.T) {
	t.Parallel()
	broken, other := errors.New("broken"), errors.New("other")
	whole := func(_ context.Context, w io.Writer) error {
		_, err := io.WriteString(w, "text")
		return err
	}
	readAll := func(r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		return err
	}
	for name, test := range map[string]struct {
		write func(context.Context, io.Writer) error
		read  func(io.Reader) error
		want  error
	}{
		"both succeed": {whole, readAll, nil},
		"write fails": {func(ctx context.Context, w io.Writer) error {
			return errors.Join(whole(ctx, w), broken)
		}, readAll, broken},
		"read fails": {whole, func(io.Reader) error { return broken }, broken},
		"read fails while it is waited for": {func(ctx context.Context, _ io.Writer) error {
			<-ctx.Done()
			return ctx.Err()
		}, func(io.Reader) error { return broken }, broken},
		"both fail": {func(context.Context, io.Writer) error { return other }, func(r io.Reader) error {
			return errors.Join(broken, readAll(r))
		}, other},
		"read ends early": {func(_ context.Context, w io.Writer) error {
			_, err := io.Copy(w, strings.NewReader(strings.Repeat("x", 1<<20)))
			return err
		}, func(io.Reader) error { return nil }, errFed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if err := Feed(t.Context(), test.write, test.read); !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
}
