package tree

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// fstat describes an open file, and leaves it as it is: asking it for its descriptor
// would make it one that waits.
func fstat(file *os.File) (stat unix.Stat_t, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return stat, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		err = dirfd.Retry(func() error { return unix.Fstat(int(fd), &stat) })
	})
	return stat, errors.Join(controlErr, err)
}

// openWaiting opens a path. Opening a FIFO waits for its other end, but no longer
// than for ctx.
func openWaiting(ctx context.Context, path string, flags int) (*os.File, error) {
	type opened struct {
		file *os.File
		err  error
	}
	result := make(chan opened, 1)
	go func() {
		file, err := os.OpenFile(path, flags, 0)
		result <- opened{file, err}
	}()
	select {
	case o := <-result:
		return o.file, o.err
	case <-ctx.Done():
	}
	go func() {
		// Being the other end for a moment lets the waiting one go.
		if info, err := os.Stat(path); err == nil && info.Mode().Type() == fs.ModeNamedPipe {
			if other, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0); err == nil {
				defer func() { _ = other.Close() }()
			}
		}
		if o := <-result; o.err == nil {
			_ = o.file.Close()
		}
	}()
	return nil, context.Cause(ctx)
}

func parseUint32(text string) (uint32, error) {
	n, err := strconv.ParseUint(text, 10, 32)
	return uint32(n), err
}
