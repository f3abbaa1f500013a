package dirfd_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

func TestRetry(t *testing.T) {
	t.Parallel()
	calls := 0
	err := dirfd.Retry(func() error {
		if calls++; calls < 3 {
			return unix.EINTR
		}
		return unix.ENOENT
	})
	if calls != 3 || !errors.Is(err, unix.ENOENT) {
		t.Errorf("%d calls, %v", calls, err)
	}
}

// Each call works on a link itself, and in the directory that is open, not in one that has its
// path since.
func TestLinks(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	path := filepath.Join(parent, "dir")
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(path, "sub"), 0o700), os.Symlink("sub", filepath.Join(path, "link")))
	opened, err := os.Open(path)
	must(err)
	defer func() { _ = opened.Close() }()
	must(os.Rename(path, filepath.Join(parent, "moved")), os.Mkdir(path, 0o700))
	dir := int(opened.Fd())

	if text, err := dirfd.ReadLink(dir, "link"); err != nil || text != "sub" {
		t.Errorf("the link leads to %q, %v", text, err)
	}
	if _, err := dirfd.ReadLink(dir, "sub"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a directory is read as a link: %v", err)
	}
	at := time.Unix(1, 5)
	must(dirfd.SetTime(dir, "link", at))
	stat, err := dirfd.Lstat(dir, "link")
	if err != nil || stat.Mode&unix.S_IFMT != unix.S_IFLNK || time.Unix(stat.Mtim.Unix()) != at {
		t.Errorf("the link is %+v, %v", stat, err)
	}
	if stat, err := dirfd.Lstat(dir, "sub"); err != nil || time.Unix(stat.Mtim.Unix()).Equal(at) {
		t.Errorf("what the link leads to has its time: %v", err)
	}
	if _, err := dirfd.OpenDir(dir, "link"); !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link is opened as a directory: %v", err)
	}
	sub, err := dirfd.OpenDir(dir, "sub")
	must(err)
	defer func() { _ = sub.Close() }()
	flags, err := unix.FcntlInt(sub.Fd(), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("programs inherit the directory: %v", err)
	}
	file, err := dirfd.Open(int(sub.Fd()), "new", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	must(err)
	must(file.Close())
	if _, err := os.Stat(filepath.Join(parent, "moved/sub/new")); err != nil {
		t.Error(err)
	}
}
