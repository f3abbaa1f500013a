package tree

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// retry repeats a system call that a signal interrupts.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// openAt opens a name in a directory.
func openAt(dir int, name string, flags int, mode uint32) (*os.File, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// fstat describes an open file, and leaves it as it is: asking it for its descriptor
// would make it one that waits.
func fstat(file *os.File) (stat unix.Stat_t, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return stat, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		err = retry(func() error { return unix.Fstat(int(fd), &stat) })
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

// readLink reads a symbolic link.
func readLink(dir int, name string) (string, error) {
	buf := make([]byte, maxPath)
	var n int
	err := retry(func() (err error) {
		n, err = unix.Readlinkat(dir, name, buf)
		return err
	})
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// setTime sets the time of the last change of what a directory has under a name.
func setTime(dir int, name string, t time.Time) error {
	stamp := unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	return retry(func() error {
		return unix.UtimesNanoAt(dir, name, []unix.Timespec{stamp, stamp}, unix.AT_SYMLINK_NOFOLLOW)
	})
}

func parseUint32(text string) (uint32, error) {
	n, err := strconv.ParseUint(text, 10, 32)
	return uint32(n), err
}
