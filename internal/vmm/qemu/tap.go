package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm"
)

// tunDevice is the device by which TAP interfaces are used; see the kernel's
// Documentation/networking/tuntap.rst.
const tunDevice = "/dev/net/tun"

// openLink returns the file by which QEMU reaches the other end of a network interface, and
// what is to be called when QEMU has inherited it.
func openLink(nic vmm.NIC) (file *os.File, release func(), err error) {
	if err := nic.Validate(); err != nil {
		return nil, nil, err
	}
	if nic.Link != nil {
		return nic.Link, func() {}, nil // the caller's own
	}
	if file, err = openTAP(nic.TAP); err != nil {
		return nil, nil, err
	}
	return file, func() { _ = file.Close() }, nil
}

// openTAP opens a TAP interface for QEMU to inherit: so QEMU needs no right to open any, and
// the interface is that of this thread's network namespace.
func openTAP(name string) (*os.File, error) {
	file, err := attachTAP(name)
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

func attachTAP(name string) (*os.File, error) {
	// What is not there the kernel would make, for who may.
	if _, err := net.InterfaceByName(name); err != nil {
		return nil, err
	}
	// Not by package os: its poller takes no file that is not attached yet.
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: tunDevice, Err: err}
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
