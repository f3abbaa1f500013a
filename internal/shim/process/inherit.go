package process

import (
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
)

// keepInherited keeps the files that the launcher means for the shim from the VMM, and
// closes all others that it has: its shell's, say, which may hold a lock or a pipe that
// somebody waits for. Inherited files are those without close-on-exec: this process
// opens all of its own with it.
func keepInherited(listeners int) error {
	return proc.CloseInherited(shim.FirstListenerFD + listeners - 1)
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
func inheritListeners(forwards []shim.Forward) ([]io.Closer, error) {
	listeners := make([]io.Closer, 0, len(forwards))
	for i, forward := range forwards {
		file := os.NewFile(uintptr(shim.FirstListenerFD+i), "listener")
		listener, err := listenerOf(file)
		_ = file.Close()
		if err != nil {
			return nil, fmt.Errorf("take over the listener on %s: %w", forward.Host, err)
		}
		listeners = append(listeners, listener)
	}
	return listeners, nil
}

// listenerOf makes a listener of a file that another process has bound: a [net.Listener],
// or a [net.PacketConn]. The file may be closed then.
func listenerOf(file *os.File) (io.Closer, error) {
	kind, err := unix.GetsockoptInt(int(file.Fd()), unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return nil, os.NewSyscallError("getsockopt", err)
	}
	if kind == unix.SOCK_DGRAM {
		return net.FilePacketConn(file)
	}
	return net.FileListener(file)
}
