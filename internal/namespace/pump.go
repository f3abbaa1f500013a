package namespace

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// frameOverhead is how much longer than the MTU a frame may be: Ethernet's header, and a tag
// of a VLAN.
const frameOverhead = 14 + 4

// pump moves frames between the file of an interface and a link, both ways. Neither side is
// ever kept waiting by the other: while the link takes nothing, frames wait in the queue of
// the interface, and those that don't fit there are lost, as the kernel loses frames of any
// interface; the same holds for what the command does not take from its TAP.
type pump struct {
	tap, link *os.File
	mtu       int
	close     func()
	running   sync.WaitGroup
}

// newPump returns a pump of a file of an interface, which it takes, and a link, which it
// duplicates.
func newPump(tap, link *os.File, mtu int) (_ *pump, err error) {
	defer func() {
		if err != nil {
			_ = tap.Close()
		}
	}()
	ours, err := pollable(link)
	if err != nil {
		return nil, fmt.Errorf("use the network link: %w", err)
	}
	theirs, err := pollable(tap)
	_ = tap.Close()
	if err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("use the TAP interface: %w", err)
	}
	p := &pump{tap: theirs, link: ours, mtu: mtu}
	p.close = sync.OnceFunc(func() {
		_, _ = p.tap.Close(), p.link.Close()
		p.running.Wait()
	})
	return p, nil
}

// pollable duplicates a file so that Go's poller waits for it, and no thread does.
func pollable(file *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

// run starts to move frames. It ends when one side has ended, or with close.
func (p *pump) run() {
	for _, way := range [][2]*os.File{{p.tap, p.link}, {p.link, p.tap}} {
		p.running.Go(func() {
			p.move(way[0], way[1])
			// The other direction is of no use alone.
			_, _ = p.tap.Close(), p.link.Close()
		})
	}
}

// move moves frames one way, until a side has ended.
func (p *pump) move(from, to *os.File) {
	frame := make([]byte, p.mtu+frameOverhead+1)
	for {
		n, err := from.Read(frame)
		switch {
		case errors.Is(err, io.EOF):
			continue // a datagram without content
		case err != nil:
			return
		case n == len(frame):
			continue // it has been cut
		}
		if _, err := to.Write(frame[:n]); err != nil && !isLoss(err) {
			return
		}
	}
}

// isLoss reports whether an error is that of one frame, which is lost.
func isLoss(err error) bool {
	for _, errno := range []unix.Errno{
		unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EMSGSIZE,
		unix.EINVAL, // it is shorter than Ethernet's header
		unix.EIO,    // the interface is down
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
