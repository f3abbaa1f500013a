package proc

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// lastStandard is the last of the standard streams.
const lastStandard = 2

// CloseInherited keeps the inherited files up to last from programs that this one
// starts, and closes the others. It is for other programs than shims, too, that go on
// when the one that started them is over.
func CloseInherited(last int) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list open files: %w", err)
	}
	for _, entry := range entries {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil || fd <= lastStandard {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		switch {
		case err != nil: // closed since: the directory itself
		case fd <= last:
			unix.CloseOnExec(fd)
		case flags&unix.FD_CLOEXEC == 0:
			_ = unix.Close(fd)
		}
	}
	return nil
}
