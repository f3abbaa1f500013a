package tree

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// output is a file that is being received.
type output struct {
	file *os.File
	// stream reports whether the file is written to from where it is, with nothing else done
	// to it.
	stream bool
	// done, if it is not nil, is called before the file is closed.
	done func()

	dir  handle
	name string
	temp string // what it is called until it is complete; empty: name
	// old is what was there before, if something was.
	old   *unix.Stat_t
	mode  uint32
	mtime time.Time
	// fresh reports whether the file did not exist before. It is removed if it does not become
	// complete.
	fresh bool
	// inPlace reports whether the new content must be written into the old file.
	inPlace bool
}

// writeError is the error of a file that could not be written, and not of the stream.
type writeError struct{ err error }

func (e *writeError) Error() string { return e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// output opens a file to be received.
func (h handle) output(entry Entry, untrusted bool) (*output, error) {
	out := &output{dir: h, name: entry.Name, mode: entry.Permissions(untrusted), mtime: entry.ModTime}
	var err error
	if out.file, err = h.create(out.name); err == nil {
		out.fresh = true
		return out, nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	old, err := h.stat(out.name)
	if err != nil {
		return nil, err
	}
	switch kind := old.Mode & unix.S_IFMT; kind {
	case unix.S_IFREG:
		out.old = &old
		out.mode = old.Mode & 0o7777
		if untrusted { // whoever set a set-id bit relied on the content
			out.mode = old.Mode & 0o777
		}
	case unix.S_IFLNK:
	case unix.S_IFDIR:
		return nil, errors.New("it is a directory, and the source is not")
	default:
		return nil, errors.New("it is " + kindOf(kind) + ", which is not written to in a tree")
	}
	out.temp, err = h.temporary(func(name string) (err error) {
		out.file, err = h.create(name)
		return err
	})
	if err == nil {
		return out, nil
	}
	if out.old == nil || isFinal(err) && !errors.Is(err, unix.EROFS) {
		return nil, err
	}
	// Where nothing can be made beside it, it can still be written to.
	if out.file, err = out.openOld(); err != nil {
		return nil, err
	}
	out.stream = true
	return out, out.truncate()
}

// openOld opens the file that was there before.
func (o *output) openOld() (*os.File, error) {
	file, err := dirfd.Open(o.dir.fd, o.name, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	stat, err := fstat(file)
	if err == nil && (stat.Mode&unix.S_IFMT != unix.S_IFREG || stat.Ino != o.old.Ino || stat.Dev != o.old.Dev) {
		err = errors.New("it was replaced while it was copied to")
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

func (o *output) truncate() error {
	if err := o.file.Truncate(0); err != nil {
		_ = o.file.Close()
		return err
	}
	return nil
}

// receive reads the content of the file, and puts the file in its place. A failure is
// that of the sender; the file is then as it was.
func (o *output) receive(in *Decoder) (failure string, err error) {
	failure, err = o.content(in)
	if err == nil && failure == "" && !o.stream {
		if modeErr := o.setMode(); modeErr != nil {
			err = &writeError{modeErr}
		}
	}
	if o.done != nil {
		o.done()
	}
	closeErr := o.file.Close()
	if err == nil && closeErr != nil {
		err = &writeError{closeErr}
	}
	if o.stream {
		return failure, err
	}
	if err == nil && failure == "" {
		err = o.commit()
	}
	if err != nil || failure != "" {
		o.abandon()
	}
	return failure, err
}

func (o *output) abandon() {
	switch {
	case o.temp != "":
		_ = o.dir.remove(o.temp)
	case o.fresh:
		_ = o.dir.remove(o.name)
	}
}

func (o *output) content(in *Decoder) (failure string, err error) {
	var length, written int64
	for {
		event, err := in.Next()
		if err != nil {
			return "", err
		}
		switch event.Kind {
		case EventData:
			if o.stream {
				_, err = o.file.Write(event.Data)
			} else {
				_, err = o.file.WriteAt(event.Data, length)
			}
			length += int64(len(event.Data))
			written = length
		case EventHole:
			if length += event.Hole; o.stream {
				err = WriteZeros(o.file, event.Hole)
				written = length
			}
		case EventEndFile:
			if event.Failure == "" && length > written {
				err = o.file.Truncate(length)
			}
			if err != nil {
				return "", &writeError{err}
			}
			return event.Failure, nil
		default: // the decoder lets nothing else through
			err = protocolError("a file within a file")
		}
		if err != nil {
			return "", &writeError{err}
		}
	}
}

// WriteZeros writes so many zeros.
func WriteZeros(w io.Writer, length int64) error {
	zeros := make([]byte, min(length, maxChunk))
	for length > 0 {
		n, err := w.Write(zeros[:min(length, int64(len(zeros)))])
		if err != nil {
			return err
		}
		length -= int64(n)
	}
	return nil
}

// chmod sets all twelve bits of a mode.
func chmod(file *os.File, mode uint32) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) {
		err = dirfd.Retry(func() error { return unix.Fchmod(int(fd), mode) })
	})
	return errors.Join(controlErr, err)
}

// commit puts the complete file in its place.
func (o *output) commit() error {
	name := o.name
	if o.temp != "" {
		name = o.temp
	}
	if err := dirfd.SetTime(o.dir.fd, name, o.mtime); err != nil && !isUnsupported(err) {
		return &writeError{err}
	}
	if o.temp == "" {
		return nil
	}
	if !o.inPlace {
		err := o.dir.rename(o.temp, o.name)
		if err == nil {
			return nil
		}
		if o.old == nil || !errors.Is(err, unix.EBUSY) { // a mount point
			return &writeError{err}
		}
	}
	if err := o.overwrite(); err != nil {
		return &writeError{err}
	}
	_ = o.dir.remove(o.temp)
	return nil
}

// setMode gives the new file its mode, and the owner of the old one. One that can't be
// given that can't take its place, and neither can one for a file with several names.
func (o *output) setMode() error {
	if o.old != nil {
		mine, err := fstat(o.file)
		if err == nil && (mine.Uid != o.old.Uid || mine.Gid != o.old.Gid) {
			err = o.file.Chown(int(o.old.Uid), int(o.old.Gid))
		}
		o.inPlace = err != nil || o.old.Nlink > 1
	}
	if err := chmod(o.file, o.mode); !isUnsupported(err) {
		return err
	}
	return nil
}

// isUnsupported reports whether an error is that of a file system without the modes and
// times of Unix. What is copied there has those that it gives.
func isUnsupported(err error) bool {
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EINVAL)
}

// overwrite writes the new content into the old file. Whether there is room for it is
// looked at first, as the old content is then lost.
func (o *output) overwrite() error {
	from, err := dirfd.Open(o.dir.fd, o.temp, unix.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	to, err := o.openOld()
	if err != nil {
		return err
	}
	defer func() { _ = to.Close() }()
	stat, err := fstat(from)
	if err != nil {
		return err
	}
	if err := o.checkRoom(to, stat.Blocks-o.old.Blocks); err != nil {
		return err
	}
	if err := to.Truncate(0); err != nil {
		return err
	}
	if err := copySparse(to, from, &stat); err != nil {
		return err
	}
	if o.old.Mode&0o6000 != 0 {
		if err := chmod(to, o.mode); err != nil {
			return err
		}
	}
	// With permission to write, but not the owner, it has the time of now.
	if err := dirfd.SetTime(o.dir.fd, o.name, o.mtime); err != nil && !isUnsupported(err) {
		return err
	}
	return to.Close()
}

// checkRoom reports that a file system has no room for so many more blocks of 512 bytes.
func (o *output) checkRoom(file *os.File, blocks int64) error {
	var room unix.Statfs_t
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) { err = unix.Fstatfs(int(fd), &room) })
	if controlErr != nil || err != nil {
		return nil //nolint:nilerr // nothing is known
	}
	if blocks > 0 && uint64(blocks) > room.Bavail*uint64(room.Bsize)/512 {
		return fmt.Errorf("%w: it has several names, so it is written over, and needs twice the room", unix.ENOSPC)
	}
	return nil
}

// copySparse copies a file within this machine, holes as holes.
func copySparse(to, from *os.File, stat *unix.Stat_t) error {
	sparse := stat.Blocks*512 < stat.Size
	for offset := int64(0); offset < stat.Size; {
		data, next := offset, stat.Size
		if sparse {
			data, next = nextData(from, offset, stat.Size)
		}
		if _, err := to.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := from.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if n, err := io.CopyN(to, from, next-data); err != nil {
			return fmt.Errorf("copy %d bytes after %d: %w", next-data, n, err)
		}
		offset = next
	}
	return to.Truncate(stat.Size)
}
