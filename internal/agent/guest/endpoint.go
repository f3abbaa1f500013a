package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// The kinds of an endpoint, as the agent beside an init is told them.
const (
	kindPort  = "port"
	kindVsock = "vsock"
)

// endpoint is the guest's end of the guest channel.
type endpoint interface {
	// next returns the channel over which the next hello is to come. That may be the one of
	// the session before, as long as the host's end of it is open.
	next() (channel, error)
}

// channel is one stream to the host, which sessions have one after the other. Closing it ends
// only the session over it.
type channel interface {
	io.ReadWriteCloser
	// sayAgain tells the host, if it is there, that a session is over.
	sayAgain() error
	// lost notes that the host's end was closed.
	lost()
}

// newEndpoint returns the endpoint of an open device or listener.
func newEndpoint(file *os.File, kind string) (endpoint, error) {
	switch kind {
	case kindPort:
		return &port{file}, nil
	case kindVsock:
		return listenOn(&vsockListener{file}), nil
	}
	return nil, fmt.Errorf("guest channel of kind %q", kind)
}

// port is a virtio-serial port, which is opened once and for all: an endpoint with one channel.
type port struct{ *os.File }

// next returns when the host's end is open. A device whose other end is closed reads as if it
// had ended.
func (p *port) next() (channel, error) {
	if err := p.SetReadDeadline(noDeadline); err != nil {
		return nil, err
	}
	raw, err := p.SyscallConn()
	if err != nil {
		return nil, err
	}
	return p, raw.Read(hostIsThere)
}

// Close ends reads that wait.
func (p *port) Close() error { return p.SetReadDeadline(longAgo) }

func (p *port) sayAgain() error {
	raw, err := p.SyscallConn()
	if err != nil {
		return err
	}
	there := false
	if err := raw.Control(func(fd uintptr) { there = hostIsThere(fd) }); err != nil || !there {
		return err
	}
	return wire.Write(p, wire.Answer{Again: true})
}

func (*port) lost() {}

func hostIsThere(fd uintptr) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(poll, 0)
	return err != nil || n == 0 || poll[0].Revents&unix.POLLHUP == 0
}

// listener accepts connections of the host.
type listener interface {
	accept() (deadlineConn, error)
}

// deadlineConn is an open connection.
type deadlineConn interface {
	io.ReadWriteCloser
	SetReadDeadline(t time.Time) error
}

// connections is an endpoint that the host connects to. One connection is served at a time, the
// newest: the host has one guest channel, so it opens another only when it has given up the one
// before, which the guest need not have noticed. (Firecracker's is reset when the guest is saved.)
// A deadline for a hello would have to know how slow this guest is, and how long it is paused.
type connections struct {
	newest chan *connection // holds the newest that is not served yet
	failed chan error       // receives why no more are accepted

	current *connection // that is served; used by next only
}

func listenOn(l listener) *connections {
	c := &connections{newest: make(chan *connection, 1), failed: make(chan error, 1)}
	go c.accept(l)
	return c
}

// accept accepts connections until that fails, and closes each when the next one has come.
func (c *connections) accept(l listener) {
	var last *connection
	for {
		conn, err := l.accept()
		if err != nil {
			c.failed <- err
			return
		}
		if last != nil {
			last.lost()
		}
		last = &connection{deadlineConn: conn}
		select {
		case <-c.newest: // nobody has served it, and it is closed
		default:
		}
		c.newest <- last // only this goroutine sends
	}
}

func (c *connections) next() (channel, error) {
	if c.current != nil && c.current.reopen() == nil {
		return c.current, nil
	}
	select {
	case c.current = <-c.newest:
		return c.current, nil
	case err := <-c.failed:
		return nil, err
	}
}

// connection is one connection of the host's.
type connection struct {
	deadlineConn

	mu    sync.Mutex
	ended bool
}

// reopen makes the connection ready for another session; it fails if it has ended.
func (c *connection) reopen() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return os.ErrClosed
	}
	return c.SetReadDeadline(noDeadline)
}

// Close ends reads that wait.
func (c *connection) Close() error { return c.SetReadDeadline(longAgo) }

// lost closes the connection, which ends reads and writes.
func (c *connection) lost() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended {
		c.ended = true
		_ = c.deadlineConn.Close()
	}
}

// sayAgain is told to a host that has ended a session and kept the connection. Where that has
// ended too, there is nobody to tell.
func (c *connection) sayAgain() error {
	if wire.Write(c, wire.Answer{Again: true}) != nil {
		c.lost()
	}
	return nil
}

// parsePort returns the port that [wire.VsockArg] names.
func parsePort(text string) (uint32, error) {
	const anyPort = 1<<32 - 1 // VMADDR_PORT_ANY, which leaves it to the kernel
	port, err := strconv.ParseUint(text, 10, 32)
	if err != nil || port == 0 || port == anyPort {
		return 0, fmt.Errorf("kernel argument %s=%s: it must be the number of a vsock port, from 1 to %d",
			wire.VsockArg, wire.Text(text, maxQuoted), uint32(anyPort)-1)
	}
	return uint32(port), nil
}

// maxQuoted is how much of a kernel argument is quoted, in characters.
const maxQuoted = 20

// openVsock listens for the host on a vsock port. The modules are loaded one after the other, and
// that with the device's driver after the port listens: a host that has connected before is
// served then, instead of being refused.
func openVsock(port uint32, load []func() error) (*os.File, error) {
	file, err := listenVsock(port)
	for _, module := range load {
		if loadErr := module(); loadErr != nil {
			err = loadErr
			break
		}
		if errors.Is(err, unix.EAFNOSUPPORT) {
			file, err = listenVsock(port)
		}
	}
	if errors.Is(err, unix.EAFNOSUPPORT) {
		err = fmt.Errorf("%w: neither the kernel nor the initramfs has the module vsock", err)
	}
	if err != nil {
		if file != nil {
			_ = file.Close()
		}
		return nil, fmt.Errorf("guest channel over vsock port %d: %w", port, err)
	}
	return file, nil
}

func listenVsock(port uint32) (*os.File, error) {
	// Non-blocking, so that it can be waited for together with everything else.
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
	if err == nil {
		err = unix.Listen(fd, vsockBacklog)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}

// acceptRetry is how long it takes to try again when there is nothing left to accept by.
const acceptRetry = 100 * time.Millisecond

// vsockBacklog is how many connections may wait to be accepted. The host has one.
const vsockBacklog = 8

// vsockListener implements [listener] by a vsock socket.
type vsockListener struct{ *os.File }

// accept returns the next connection of the host. Others, which programs of the guest can make
// where the kernel has vsock_loopback, are closed.
func (l *vsockListener) accept() (deadlineConn, error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	for {
		var fd int
		var peer unix.Sockaddr
		var acceptErr error
		err := raw.Read(func(listening uintptr) bool {
			fd, peer, acceptErr = unix.Accept4(int(listening), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return !errors.Is(acceptErr, unix.EAGAIN)
		})
		switch err = errors.Join(err, acceptErr); {
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.ECONNRESET):
			continue // it was given up, or was reset together with the whole device
		case errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOBUFS):
			<-time.After(acceptRetry) // others have it all, and nothing tells when that changes
			continue
		case err != nil:
			return nil, fmt.Errorf("accept on the guest channel: %w", err)
		}
		if from, ok := peer.(*unix.SockaddrVM); ok && from.CID == unix.VMADDR_CID_HOST {
			return os.NewFile(uintptr(fd), "vsock connection"), nil
		}
		_ = unix.Close(fd)
	}
}
