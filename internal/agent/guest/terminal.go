package guest

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// Deadlines that end a read at once, and that take that back.
var (
	longAgo    = time.Unix(1, 0)
	noDeadline = time.Time{}
)

// openTerminal makes a pseudo-terminal of the user's; see pts(4).
func openTerminal(tty *wire.TTY, user account) (ours, theirs *os.File, err error) {
	// Non-blocking, so that reads end when asked to.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	ours = os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			_ = ours.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, fmt.Errorf("unlock: %w", err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, fmt.Errorf("number: %w", err)
	}
	if err := setSize(ours, uint32(tty.Columns), uint32(tty.Rows)); err != nil {
		return nil, nil, fmt.Errorf("set size: %w", err)
	}
	name := fmt.Sprintf("/dev/pts/%d", number)
	theirs, err = os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	if os.Getuid() == 0 {
		if err := theirs.Chown(int(user.uid), int(user.gid)); err != nil {
			_ = theirs.Close()
			return nil, nil, err
		}
	}
	return ours, theirs, nil
}

func setSize(terminal *os.File, columns, rows uint32) error {
	raw, err := terminal.SyscallConn()
	if err != nil {
		return err
	}
	size := &unix.Winsize{Col: uint16(min(columns, 1<<16-1)), Row: uint16(min(rows, 1<<16-1))}
	controlErr := raw.Control(func(fd uintptr) { err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, size) })
	if controlErr != nil {
		return controlErr
	}
	return err
}

// typeIn types what a reader has into a terminal. Its end is typed as a user does it, by
// the key that the terminal has for that, Ctrl-D as a rule: once to end a line that was
// begun, and once more to end the input.
func typeIn(terminal *os.File, keys io.Reader) {
	last := lastByte('\n')
	if _, err := io.Copy(terminal, io.TeeReader(keys, &last)); err != nil {
		return
	}
	raw, err := terminal.SyscallConn()
	if err != nil {
		return
	}
	var mode *unix.Termios
	controlErr := raw.Control(func(fd uintptr) { mode, err = unix.IoctlGetTermios(int(fd), unix.TCGETS) })
	if controlErr != nil || err != nil {
		return
	}
	key := mode.Cc[unix.VEOF]
	if last != '\n' && mode.Lflag&unix.ICANON != 0 {
		_, _ = terminal.Write([]byte{key, key})
		return
	}
	_, _ = terminal.Write([]byte{key}) // programs that read single keys know it as well
}

// lastByte remembers the last byte that was written.
type lastByte byte

func (b *lastByte) Write(p []byte) (int, error) {
	if len(p) > 0 {
		*b = lastByte(p[len(p)-1])
	}
	return len(p), nil
}
