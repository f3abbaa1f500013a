package guest

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// uevents hears of devices as the kernel finds them.
type uevents struct{ fd int }

func openUevents() (*uevents, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("listen for devices: %w", err)
	}
	// Group 1 is the kernel's own.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("listen for devices: %w", err)
	}
	return &uevents{fd: fd}, nil
}

// Close stops listening.
func (u *uevents) Close() error { return unix.Close(u.fd) }

// until calls try now and after every event, until try reports that it is done.
func (u *uevents) until(try func() (bool, error)) error {
	buf := make([]byte, 8<<10)
	for {
		if done, err := try(); done || err != nil {
			return err
		}
		_, err := unix.Read(u.fd, buf)
		// ENOBUFS: there were more events than fit; any is as good as another.
		if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("listen for devices: %w", err)
		}
	}
}

// openPort opens the guest channel when its device is there.
func openPort(events *uevents) (*os.File, error) {
	var port *os.File
	err := events.until(func() (bool, error) {
		path, err := findPort(wire.PortName)
		if path == "" || err != nil {
			return false, err
		}
		// Non-blocking, so that a read can wait together with everything else.
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		// The device appears before its driver is ready for it.
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("open guest channel %s: %w", path, err)
		}
		port = os.NewFile(uintptr(fd), path)
		return true, nil
	})
	return port, err
}
