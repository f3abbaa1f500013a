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

	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/jail"
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

// runDir is the directory that one Firecracker runs in: one with links, or the root of a jail. It
// is held open, so it may be moved. Its methods may be called from any goroutine.
type runDir struct {
	jail *jail.Jail // nil: Firecracker is not in one
	user *jail.User // the jail's

	mu   sync.RWMutex // guards the following, which is not closed while it is used
	file *os.File     // nil: the directory was removed
}

// filesOf returns a VM's files by the names that Firecracker knows them by. All are there.
func filesOf(cfg vmm.Config) ([]jail.File, error) {
	var files []jail.File
	if restore := cfg.Restore; restore != nil {
		files = append(files, jail.File{Name: nameMemory, Path: restore.Memory}, jail.File{Name: nameState, Path: restore.State})
	} else {
		files = append(files, jail.File{Name: nameKernel, Path: cfg.Kernel})
		if cfg.Initrd != "" {
			files = append(files, jail.File{Name: nameInitrd, Path: cfg.Initrd})
		}
	}
	for n, drive := range cfg.Drives {
		files = append(files, jail.File{Name: driveName(n), Path: drive.Path, Writable: !drive.ReadOnly})
	}
	for i := range files {
		if _, err := os.Stat(files[i].Path); err != nil {
			return nil, err
		}
		var err error
		if files[i].Path, err = filepath.Abs(files[i].Path); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// newRunDir makes a directory with links to files, or a jail with them if there is a jailer.
func newRunDir(binary, jailer string, cfg vmm.Config, files []jail.File) (*runDir, error) {
	if cfg.WorkDir == "" {
		return nil, errors.New("the VM has no directory to work in")
	}
	path, err := filepath.Abs(filepath.Join(cfg.WorkDir, runDirName))
	if err != nil {
		return nil, err
	}
	// One that is there was left by a VMM that has ended, as only one runs at a time.
	if err := jail.Remove(path); err != nil {
		return nil, err
	}
	d := &runDir{}
	root := path
	if jailer == "" {
		err = os.Mkdir(path, 0o700)
	} else {
		root, err = d.makeJail(jail.Config{Jailer: jailer, Firecracker: binary, Dir: path, ID: identifier(cfg.ID), Files: files})
	}
	if err == nil {
		d.file, err = os.Open(root)
	}
	for _, file := range files {
		if err == nil && d.jail == nil {
			err = os.Symlink(file.Path, filepath.Join(root, file.Name))
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.drop(path))
	}
	return d, nil
}

// makeJail makes a jail with a user of its own, and returns its root.
func (d *runDir) makeJail(config jail.Config) (root string, err error) {
	if d.user, err = (jail.Users{}).Take(); err != nil {
		return "", err
	}
	config.User = d.user.ID()
	if d.jail, err = jail.New(config); err != nil {
		return "", err
	}
	return d.jail.Root(), nil
}

// own gives something that was made in the directory to Firecracker's user.
func (d *runDir) own(name string) error {
	if d.jail == nil {
		return nil
	}
	return d.within(func(path string) error {
		return os.Lchown(filepath.Join(path, name), d.user.ID(), d.user.ID())
	})
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

// link gives a file that is there a name in the directory, which is no jail.
func (d *runDir) link(path, name string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	return d.within(func(dir string) error { return os.Symlink(path, filepath.Join(dir, name)) })
}

// take moves what Firecracker has made in its jail to a path, in place of the file there, as one
// of this process's user.
func (d *runDir) take(name, path string) error {
	return d.within(func(dir string) error {
		made := filepath.Join(dir, name)
		if err := os.Lchown(made, os.Getuid(), os.Getgid()); err != nil {
			return err
		}
		return os.Rename(made, path)
	})
}

// unlink takes a name away. One that is not there is a success.
func (d *runDir) unlink(name string) error {
	err := d.within(func(dir string) error { return os.Remove(filepath.Join(dir, name)) })
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errEnded) {
		return nil
	}
	return err
}

// remove removes the directory and what is in it, and closes it. Firecracker has ended.
func (d *runDir) remove() error {
	path, err := d.path()
	if err != nil {
		return err
	}
	if d.jail != nil { // its root is three below
		path = filepath.Dir(filepath.Dir(filepath.Dir(path)))
	}
	return d.drop(path)
}

// drop lets go of all that there is of a directory.
func (d *runDir) drop(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := jail.Remove(path)
	if d.file != nil {
		err = errors.Join(err, d.file.Close())
		d.file = nil
	}
	if d.user != nil {
		d.user.Release()
	}
	return err
}
