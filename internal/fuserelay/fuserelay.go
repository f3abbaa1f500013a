// Package fuserelay connects the FUSE of this kernel to a server elsewhere, over a stream.
//
// The messages are passed on as they are: each begins with its length, so they need no frame
// around them. What they mean is known to the server only; see package hostdir.
package fuserelay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Device is the kernel's FUSE.
const Device = "/dev/fuse"

const (
	// bufferSize holds the longest request: a write of 1 MiB with its header.
	bufferSize = 1<<20 + 4096
	// headerSize is that of an answer.
	headerSize = 16
	// maxAnswer bounds an answer of the server, in bytes.
	maxAnswer = 1<<20 + 4096
	// entryNotice is FUSE_NOTIFY_INVAL_ENTRY.
	entryNotice = 3
	// maxNotices is how many notices may wait.
	maxNotices = 1024
)

// Options of a [Mount].
type Options struct {
	// ReadOnly mounts it so.
	ReadOnly bool
	// Source is its name in the list of mounts.
	Source string
}

// FS is a file system of FUSE that this process serves.
type FS struct {
	device *os.File
	target string
	root   int // a descriptor of its root, by which it is found whatever is on the way there
}

// Mount mounts a file system at a directory. It is served once [FS.Relay] is called; until then
// whoever uses it waits.
func Mount(target string, opts Options) (*FS, error) {
	fd, err := unix.Open(Device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: Device, Err: err}
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if opts.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", fd)
	if err := unix.Mount(opts.Source, target, "fuse", flags, data); err != nil {
		return nil, errors.Join(&os.PathError{Op: "mount", Path: target, Err: err}, unix.Close(fd))
	}
	// Not before: who waits for a device that is not mounted yet is never woken.
	device := os.NewFile(uintptr(fd), Device)
	root, err := unix.Open(target, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(&os.PathError{Op: "open", Path: target, Err: err}, unix.Unmount(target, unix.MNT_DETACH), device.Close())
	}
	return &FS{device: device, target: target, root: root}, nil
}

// Relay passes messages on until the connection ends or the file system is unmounted. It closes
// neither. The error says which it was: [ErrUnmounted], or that of the connection.
func (f *FS) Relay(conn io.ReadWriter) error {
	// By a descriptor of its own, as each is written to by one at a time.
	device, err := f.duplicate()
	if err != nil {
		return err
	}
	notices := make(chan []byte, maxNotices)
	defer close(notices)
	go notify(device, notices)
	failed := make(chan error, 1)
	go func() { failed <- f.requests(conn) }()
	if err := f.answers(conn, notices); err != nil {
		select {
		case other := <-failed: // the first one says more
			return other
		default:
			return err
		}
	}
	return <-failed
}

// ErrUnmounted reports that a file system is mounted no more.
var ErrUnmounted = errors.New("file system is unmounted")

// requests passes on what the kernel asks for.
func (f *FS) requests(conn io.Writer) error {
	buffer := make([]byte, bufferSize)
	for {
		n, err := f.device.Read(buffer)
		switch {
		case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR): // the request was taken back
			continue
		case errors.Is(err, unix.ENODEV) || errors.Is(err, os.ErrClosed):
			return ErrUnmounted
		case err != nil:
			return err
		}
		if _, err := conn.Write(buffer[:n]); err != nil {
			return err
		}
	}
}

// answers passes on what the server answers.
func (f *FS) answers(conn io.Reader, notices chan<- []byte) error {
	buffer := make([]byte, 64<<10)
	for {
		if _, err := io.ReadFull(conn, buffer[:headerSize]); err != nil {
			return err
		}
		size := int(binary.NativeEndian.Uint32(buffer))
		if size < headerSize || size > maxAnswer {
			return fmt.Errorf("answer of %d bytes", size)
		}
		if size > len(buffer) {
			buffer = append(make([]byte, 0, maxAnswer), buffer[:headerSize]...)[:maxAnswer]
		}
		if _, err := io.ReadFull(conn, buffer[headerSize:size]); err != nil {
			return err
		}
		unique, code := binary.NativeEndian.Uint64(buffer[8:]), binary.NativeEndian.Uint32(buffer[4:])
		if unique == 0 && code == entryNotice {
			// It waits for whoever uses the directory, who may wait for an answer of ours.
			// If too many wait already, it is dropped: the kernel asks again when the
			// time is over for which an answer is valid.
			select {
			case notices <- append([]byte(nil), buffer[:size]...):
			default:
			}
			continue
		}
		// One that is not wanted any more is refused with ENOENT; that is no fault.
		_, err := f.device.Write(buffer[:size])
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) || errors.Is(err, os.ErrClosed) {
			return ErrUnmounted
		}
	}
}

// duplicate returns another descriptor of the device.
func (f *FS) duplicate() (fd int, err error) {
	raw, err := f.device.SyscallConn()
	if err != nil {
		return -1, err
	}
	controlErr := raw.Control(func(device uintptr) { fd, err = unix.FcntlInt(device, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(controlErr, err)
}

// notify tells the kernel of entries that have changed. It closes the device.
func notify(device int, notices <-chan []byte) {
	for notice := range notices {
		_, _ = unix.Write(device, notice) // what it does not know needs no telling
	}
	_ = unix.Close(device)
}

// ProbeName is the name of a file in the root of each file system that is in none of its lists: a
// longer one than the server's own files can have.
const ProbeName = probe50 + probe50 + probe50 + probe50 + probe50 + probe50

const probe50 = "smolvm-probes-whether-files-can-be-waited-for-here."

// Probe returns when the server answers. From then on this process may open files in the file
// system, too. Go's runtime asks the kernel of each whether it can be waited for, and holds
// what wakes all others meanwhile; so the kernel is to know already that none can.
func (f *FS) Probe() error {
	fd, err := unix.Openat(f.root, ProbeName, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "probe", Path: f.target, Err: err}
	}
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return errors.Join(err, unix.Close(fd))
}

// Abort ends the file system: whoever uses it gets errors from now on, and it is unmounted.
func (f *FS) Abort() error {
	at := "/proc/self/fd/" + strconv.Itoa(f.root)
	return errors.Join(unix.Unmount(at, unix.MNT_FORCE|unix.MNT_DETACH), unix.Close(f.root), f.device.Close())
}
