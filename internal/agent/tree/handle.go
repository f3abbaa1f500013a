package tree

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// handle is an open directory. What is done with a name in it is done there and
// nowhere else, as no link is followed.
type handle struct{ fd int }

func noHandle() handle { return handle{-1} }

func (h handle) close() {
	if h.fd >= 0 {
		_ = unix.Close(h.fd)
	}
}

// stat describes what the directory has under a name; "." is the directory itself.
func (h handle) stat(name string) (unix.Stat_t, error) { return dirfd.Lstat(h.fd, name) }

// enter opens the directory of a name; "." and ".." are two.
func (h handle) enter(name string) (handle, error) {
	inner := noHandle()
	const flags = unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	err := dirfd.Retry(func() (err error) {
		inner.fd, err = unix.Openat(h.fd, name, unix.O_RDONLY|flags, 0)
		if errors.Is(err, fs.ErrPermission) { // what may not be listed may be entered
			inner.fd, err = unix.Openat(h.fd, name, unix.O_PATH|flags, 0)
		}
		return err
	})
	if err != nil {
		return noHandle(), err
	}
	return inner, nil
}

// mkdir makes a directory that nobody else may enter, until all that is in it has come.
func (h handle) mkdir(name string) error {
	return dirfd.Retry(func() error { return unix.Mkdirat(h.fd, name, 0o700) })
}

func (h handle) chmod(mode uint32) error {
	return dirfd.Retry(func() error { return unix.Fchmod(h.fd, mode) })
}

func (h handle) remove(name string) error {
	return dirfd.Retry(func() error { return unix.Unlinkat(h.fd, name, 0) })
}

func (h handle) rename(from, to string) error {
	return dirfd.Retry(func() error { return unix.Renameat(h.fd, from, h.fd, to) })
}

// create makes a file of which nobody else may read yet. It must not exist.
func (h handle) create(name string) (*os.File, error) {
	return dirfd.Open(h.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
}

// temporary calls create with new names, until one is not taken.
func (h handle) temporary(create func(name string) error) (name string, err error) {
	for range 100 {
		name = ".smolvm-" + rand.Text()[:10]
		if err = create(name); !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	return name, err
}

// replace has something created under a name, in place of a file or a link.
func (h handle) replace(name string, create func(name string) error) error {
	err := create(name)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	stat, err := h.stat(name)
	if err != nil {
		return err
	}
	if mode := stat.Mode & unix.S_IFMT; mode != unix.S_IFREG && mode != unix.S_IFLNK {
		return errors.New("it is " + kindOf(mode) + ", which is not replaced")
	}
	temp, err := h.temporary(create)
	if err != nil {
		return err
	}
	err = h.rename(temp, name)
	// Renaming one name of a file to another of the same does nothing.
	_ = h.remove(temp)
	return err
}
