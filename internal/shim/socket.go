package shim

import (
	"context"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/stream"
)

// ErrGone says that a VM has no shim: it does not run, or its shim was killed.
var ErrGone = errors.New("the VM's shim is gone")

func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	conn, err := stream.DialUnix(ctx, path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to the VM's shim: %w", err)
	}
	return conn, nil
}
