// Package dirfd makes system calls on what an open directory has under a name. A name is looked up
// in that directory whatever is renamed meanwhile, and a call that a signal interrupts is repeated.
package dirfd

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Retry repeats a system call that a signal interrupts.
func Retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR { //nolint:errorlint // system calls return it bare
			return err
		}
	}
}

// Open opens a name, with flags and mode as openat(2) has them. Programs that are started don't
// inherit the file.
func Open(dir int, name string, flags int, mode uint32) (*os.File, error) {
	var fd int
	err := Retry(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// OpenDir opens a directory, and follows no link.
func OpenDir(dir int, name string) (*os.File, error) {
	return Open(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

// Lstat describes what is under a name, a link itself.
func Lstat(dir int, name string) (stat unix.Stat_t, err error) {
	err = Retry(func() error { return unix.Fstatat(dir, name, &stat, unix.AT_SYMLINK_NOFOLLOW) })
	return stat, err
}

// ReadLink returns what a symbolic link leads to.
func ReadLink(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	var n int
	err := Retry(func() (err error) {
		n, err = unix.Readlinkat(dir, name, buf)
		return err
	})
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// SetTime sets the times of the last change and of the last access, of a link itself.
func SetTime(dir int, name string, t time.Time) error {
	stamp := unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	return Retry(func() error {
		return unix.UtimesNanoAt(dir, name, []unix.Timespec{stamp, stamp}, unix.AT_SYMLINK_NOFOLLOW)
	})
}
