// Package tap opens TAP interfaces for VMMs.
package tap

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// device is the file by which TAP interfaces are used; see the kernel's
// Documentation/networking/tuntap.rst.
const device = "/dev/net/tun"

// Open opens a TAP interface of the network namespace that the calling thread is in. The
// error says what a person can do about it.
func Open(name string) (*os.File, error) {
	file, err := attach(name)
	if err == nil {
		return file, nil
	}
	hint := ""
	switch {
	case errors.Is(err, unix.EBUSY):
		err = errors.New("another VM or program uses it")
	case errors.Is(err, unix.EPERM):
		err = errors.New("this user may not use it")
		hint = fmt.Sprintf("`ip tuntap add dev %s mode tap user NAME`, by root, makes one for a user", name)
	case errors.Is(err, unix.EINVAL):
		err = errors.New("it is no TAP interface, or one with several queues")
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		hint = "`modprobe tun`, by root, loads the kernel's module for TAP interfaces"
	}
	err = fmt.Errorf("use TAP interface %s: %w", name, err)
	if hint != "" {
		return nil, &smolvm.Error{Hint: hint, Err: err}
	}
	return nil, err
}

// SetOwner lets a user, and nobody else without CAP_NET_ADMIN, open a TAP interface that stays
// when its file is closed. It takes that capability.
func SetOwner(name string, uid int) error {
	file, err := Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	if err := unix.IoctlSetInt(int(file.Fd()), unix.TUNSETOWNER, uid); err != nil {
		return fmt.Errorf("let user %d use TAP interface %s: %w", uid, name, err)
	}
	return nil
}

func attach(name string) (*os.File, error) {
	// What is not there the kernel would make, for who may.
	if _, err := net.InterfaceByName(name); err != nil {
		return nil, err
	}
	// Not by package os: its poller takes no file that is not attached yet.
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: device, Err: err}
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		// With headers of virtio, frames need not be cut up and summed for QEMU to join them.
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}
