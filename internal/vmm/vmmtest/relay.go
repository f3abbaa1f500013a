package vmmtest

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/vmm"
)

// RelayCommand is the argument by which a test's program becomes the guest's end of a channel
// that is vsock, for which busybox has no program. TestMain calls [Relay] then.
const RelayCommand = "vmmtest-relay"

// RelayProgram is the path at which the guest has the test's program, if its channel is vsock.
const RelayProgram = "bin/vmmtest-relay"

// Pipes by which the relay and the guest's init speak.
const (
	pipeIn  = "/run-in"
	pipeOut = "/run-out"
)

// Relay is that program: it accepts connections of the host, the latest of which is the
// channel, and copies between that and two pipes. It returns only on failure.
func Relay() error {
	in, err := os.OpenFile(pipeIn, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	out, err := os.OpenFile(pipeOut, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	listener, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(listener, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: vmm.ChannelVsockPort}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(listener, 1); err != nil {
		return os.NewSyscallError("listen", err)
	}
	var serving sync.WaitGroup
	var last *os.File
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("accept", err)
		}
		if last != nil { // the host has given it up
			_ = last.Close()
		}
		serving.Wait()
		conn := os.NewFile(uintptr(fd), "host")
		last = conn
		serving.Go(func() { relay(conn, in, out) })
	}
}

// relay copies until the connection ends. What could not be sent is for the next one.
func relay(conn, in, out *os.File) {
	defer func() { _ = conn.Close() }()
	if _, err := fmt.Fprintln(conn, ready); err != nil {
		return
	}
	if err := out.SetReadDeadline(time.Time{}); err != nil {
		return
	}
	var receiving sync.WaitGroup
	receiving.Go(func() {
		copyTo(in, conn)
		_ = out.SetReadDeadline(time.Unix(1, 0)) // there is nobody to send to any more
	})
	copyTo(conn, out)
	_ = conn.Close()
	receiving.Wait()
}

func copyTo(to, from *os.File) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
