package shim

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// The files that a shim inherits beside its standard streams.
const (
	reportsFD       = 3
	firstListenerFD = 4
)

// keepInherited keeps the files that the launcher means for the shim from the VMM, and
// closes all others that it has: its shell's, say, which may hold a lock or a pipe that
// somebody waits for. Inherited files are those without close-on-exec: this process
// opens all of its own with it.
func keepInherited(listeners int) error { return CloseInherited(firstListenerFD + listeners - 1) }

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
		if err != nil || fd < reportsFD {
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

// maxOpenFiles is how many files the shim and its VMM may have open, if the host allows it:
// two for each connection that the guest or a user has.
const maxOpenFiles = 1 << 16

// raiseOpenFiles raises the limit of open files as far as it goes. The runtime of Go does so
// for this process, but would give the VMM the limit that there was before.
func raiseOpenFiles() {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = min(limit.Max, maxOpenFiles)
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
	}
}

// inheritListeners takes over the listeners that the launcher has bound.
func inheritListeners(forwards []Forward) ([]io.Closer, error) {
	listeners := make([]io.Closer, 0, len(forwards))
	for i, forward := range forwards {
		file := os.NewFile(uintptr(firstListenerFD+i), "listener")
		listener, err := listenerOf(file)
		_ = file.Close()
		if err != nil {
			return nil, fmt.Errorf("take over the listener on %s: %w", forward.Host, err)
		}
		listeners = append(listeners, listener)
	}
	return listeners, nil
}
