package stream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// MaxSocketPath is the longest path of a unix socket, in bytes: sun_path has 108, the
// last of which is a NUL (see unix(7)).
const MaxSocketPath = 107

// withShortPath runs do with a path to the same file that is short enough for a
// socket. It is valid only within do.
func withShortPath(path string, do func(path string) error) error {
	if len(path) <= MaxSocketPath {
		return do(path)
	}
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer func() { _ = unix.Close(dir) }()
	return do(fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path)))
}

// ListenUnix makes a socket that only this user can connect to. Its path may be of any
// length. Closing the listener leaves the file.
func ListenUnix(path string) (net.Listener, error) {
	var listener *net.UnixListener
	err := withShortPath(path, func(path string) error {
		var err error
		listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return err
		}
		listener.SetUnlinkOnClose(false) // the file goes with its directory
		return os.Chmod(path, 0o600)
	})
	if err != nil && listener != nil {
		err = errors.Join(err, listener.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("make socket %s: %w", path, err)
	}
	return listener, nil
}

// DialUnix connects to a socket, whose path may be of any length.
func DialUnix(ctx context.Context, path string) (net.Conn, error) {
	var conn net.Conn
	err := withShortPath(path, func(path string) error {
		var dialer net.Dialer
		var err error
		conn, err = dialer.DialContext(ctx, "unix", path)
		return err
	})
	return conn, err
}
