package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// Hold keeps an image from being removed until release is called, or this process ends.
// The error matches [smolvm.ErrImageNotFound].
func (s *Store) Hold(digest string) (release func(), err error) {
	return s.lockImage(digest, unix.LOCK_SH)
}

// seize takes an image that nobody holds. The error matches [smolvm.ErrImageInUse] if
// somebody does.
func (s *Store) seize(digest string) (release func(), err error) {
	return s.lockImage(digest, unix.LOCK_EX)
}

func (s *Store) lockImage(digest string, how int) (release func(), err error) {
	dir := s.imageDir(digest)
	file, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(digest)
	}
	if err != nil {
		return nil, fmt.Errorf("lock image %s: %w", digest, err)
	}
	release = func() { _ = file.Close() }
	err = unix.Flock(int(file.Fd()), how|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK) && how == unix.LOCK_EX:
		err = fmt.Errorf("image %s: %w by a VM that is just being created", digest, smolvm.ErrImageInUse)
	case errors.Is(err, unix.EWOULDBLOCK): // somebody is removing it
		err = notFound(digest)
	case err == nil:
		var held, there os.FileInfo
		if held, err = file.Stat(); err != nil {
			break
		}
		if there, err = os.Stat(dir); errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(held, there) {
			err = notFound(digest)
		}
	default:
		err = fmt.Errorf("lock image %s: %w", digest, err)
	}
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}
