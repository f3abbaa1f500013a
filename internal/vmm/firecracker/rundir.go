package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/stream"
)

// runDirName is the name of the directory in [vmm.Config]'s WorkDir.
const runDirName = "vmm"

// Names of what is in a Firecracker's directory. Firecracker writes some of them into a saved
// guest's state: whoever changes one changes the layout in the backend's traits.
const (
	nameKernel = "kernel"
	nameInitrd = "initrd"
	nameMemory = "memory" // of the saved guest that is restored
	nameState  = "state"
	nameSaved  = "saved-" // what a guest is saved to begins so
	nameDrive  = "drive"  // and a number
	nameAPI    = "api.sock"
	nameVsock  = "vsock.sock"
	nameLog    = "log"
)

// runDir is the directory that one Firecracker runs in. It is held open, so it may be moved. Its
// methods may be called from any goroutine.
type runDir struct {
	mu   sync.RWMutex // guards the following, which is not closed while it is used
	file *os.File     // nil: the directory was removed
}

// newRunDir makes the directory. One that is there was left by a VMM that has ended, as only
// one runs at a time.
func newRunDir(workDir string) (*runDir, error) {
	if workDir == "" {
		return nil, errors.New("the VM has no directory to work in")
	}
	path := filepath.Join(workDir, runDirName)
	if err := os.RemoveAll(path); err != nil {
		return nil, err
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return &runDir{file: dir}, nil
}

// within calls do with a path of the directory, wherever that is, which is valid in this
// process until do returns, and short enough for a socket in it.
func (d *runDir) within(do func(path string) error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.file == nil {
		return errEnded
	}
	return do(fmt.Sprintf("/proc/self/fd/%d", d.file.Fd()))
}

// path is where the directory is now.
func (d *runDir) path() (path string, err error) {
	err = d.within(func(link string) error {
		path, err = os.Readlink(link)
		return err
	})
	return path, err
}

// dial connects to a socket in it.
func (d *runDir) dial(ctx context.Context, name string) (conn net.Conn, err error) {
	err = d.within(func(path string) error {
		conn, err = stream.DialUnix(ctx, filepath.Join(path, name))
		return err
	})
	return conn, err
}

// link gives a file that is there a name in the directory.
func (d *runDir) link(path, name string) error {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	return d.within(func(dir string) error { return os.Symlink(path, filepath.Join(dir, name)) })
}

// unlink takes a name away. One that is not there is a success.
func (d *runDir) unlink(name string) error {
	err := d.within(func(dir string) error { return os.Remove(filepath.Join(dir, name)) })
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errEnded) {
		return nil
	}
	return err
}

// remove removes the directory and what is in it, which are links and sockets, and closes it.
func (d *runDir) remove() error {
	errs := []error{d.within(removeAll)}
	d.mu.Lock()
	defer d.mu.Unlock()
	file := d.file
	d.file = nil
	return errors.Join(append(errs, file.Close())...)
}

// removeAll removes the directory that a link of the kernel's leads to.
func removeAll(link string) error {
	path, err := os.Readlink(link)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(link)
	errs := []error{err}
	for _, entry := range entries {
		errs = append(errs, os.Remove(filepath.Join(link, entry.Name())))
	}
	// Somebody else may have removed it, with the VM's own directory.
	if err := unix.Rmdir(path); !errors.Is(err, unix.ENOENT) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
