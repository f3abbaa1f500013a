package hostdir

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Check returns what keeps a directory from being given to a guest: it is not there, or is the
// kernel's, or holds, or is in, one of the directories that no guest may have.
func Check(path string, private ...string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory", path)
	}
	at, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	for _, dir := range private {
		is, err := filepath.EvalSymlinks(dir)
		if err != nil {
			continue // it is not there yet
		}
		if within(at, is) || within(is, at) {
			return fmt.Errorf("%s and smolvm's own directory %s are one in the other: a guest could change what smolvm relies on", path, dir)
		}
	}
	fd, err := unix.Open(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	if err := refuseKernelFS(fd); err != nil {
		return fmt.Errorf("%s belongs to the host's kernel", path)
	}
	return nil
}

// within reports whether a clean path is another one, or below it.
func within(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}
