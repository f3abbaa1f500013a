package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// sender writes what it finds on disk to a stream.
type sender struct {
	ctx    context.Context
	out    *Encoder
	note   func(Note)
	mounts *mounts
	buf    []byte
}

// Send writes the file or tree at path, with the end of the stream. As with cp, a
// link that path names stands for what it points to; one inside the tree is sent as
// it is. A FIFO or a device that path names is read to its end.
//
// What can't be sent is told to note, and the rest is sent: files that can't be read
// as failures; files that vanish, sockets, FIFOs, devices and what is in the kernel's
// file systems (such as /proc) otherwise. The error says that nothing could be sent,
// or that out failed.
func Send(ctx context.Context, out *Encoder, path string, note func(Note)) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	s := &sender{ctx: ctx, out: out, note: note, buf: make([]byte, maxChunk)}
	var stat unix.Stat_t
	if err := dirfd.Retry(func() error { return unix.Stat(path, &stat) }); err != nil {
		return &fs.PathError{Op: "read", Path: path, Err: err}
	}
	var err error
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = s.root(path, &stat)
	case unix.S_IFSOCK:
		return &fs.PathError{Op: "read", Path: path, Err: errors.New("it is a socket")}
	default:
		err = s.rootFile(ctx, path)
	}
	if err != nil {
		return err
	}
	return out.End()
}

// rootFile sends a file, a FIFO or a device.
func (s *sender) rootFile(ctx context.Context, path string) error {
	file, err := openWaiting(ctx, path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	stat, err := fstat(file)
	if err != nil {
		return &fs.PathError{Op: "read", Path: path, Err: err}
	}
	entry := entryOf(File, "", &stat)
	if stat.Mode&unix.S_IFMT == unix.S_IFREG {
		if err := s.out.Begin(entry); err != nil {
			return err
		}
		return s.content(file, path, &stat)
	}
	// What comes out of a FIFO or a device is a file like any other.
	entry.Mode, entry.Size, entry.ModTime = 0o644, -1, time.Now()
	if err := s.out.Begin(entry); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = file.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	return s.stream(file, path)
}

// stream sends what can only be read from its beginning to its end.
func (s *sender) stream(file *os.File, path string) error {
	for {
		n, err := file.Read(s.buf)
		if n > 0 {
			// Whoever writes to a FIFO may wait for somebody to see it.
			if err := errors.Join(s.out.Data(s.buf[:n]), s.out.Flush()); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return s.out.EndFile("")
		case err != nil:
			return s.fail(path, err)
		}
	}
}

// root sends the directory that the copy is of.
func (s *sender) root(path string, stat *unix.Stat_t) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	// Whoever names a directory of the kernel's wants what is in it.
	if s.mounts = readMounts(); s.mounts.kernel(stat.Dev) != "" {
		s.mounts = nil
	}
	return s.dir(dir, path, entryOf(Dir, "", stat))
}

// dir sends a directory with all that is in it.
func (s *sender) dir(dir *os.File, path string, entry Entry) error {
	if err := s.out.Begin(entry); err != nil {
		return err
	}
	stat, err := fstat(dir)
	if err != nil {
		return err
	}
	for {
		// In pieces, as there may be millions.
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			if err := s.child(dir, filepath.Join(path, name), name, stat.Dev); err != nil {
				return err
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				s.left(path, err)
			}
			return s.out.Leave()
		}
	}
}

// child sends what a directory has under a name.
func (s *sender) child(dir *os.File, path, name string, dev uint64) error {
	fd := int(dir.Fd())
	stat, err := dirfd.Lstat(fd, name)
	if err != nil {
		s.left(path, err)
		return nil
	}
	if len(name) > maxName {
		s.left(path, unix.ENAMETOOLONG)
		return nil
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return s.file(fd, path, name)
	case unix.S_IFDIR:
		return s.subdir(fd, path, name, dev)
	case unix.S_IFLNK:
		link, err := dirfd.ReadLink(fd, name)
		if err != nil {
			s.left(path, err)
			return nil
		}
		entry := entryOf(Symlink, name, &stat)
		entry.Link = link
		return s.out.Begin(entry)
	}
	s.note(Note{Path: path, Text: "left out: it is " + kindOf(stat.Mode)})
	return nil
}

func (s *sender) subdir(fd int, path, name string, dev uint64) error {
	inner, err := dirfd.OpenDir(fd, name)
	if err != nil {
		s.left(path, err)
		return nil
	}
	defer func() { _ = inner.Close() }()
	stat, err := fstat(inner)
	if err != nil {
		s.left(path, err)
		return nil
	}
	entry := entryOf(Dir, name, &stat)
	if stat.Dev != dev {
		if kind := s.mounts.kernel(stat.Dev); kind != "" {
			s.note(Note{Path: path, Text: "left empty: it is the kernel's file system " + kind})
			return errors.Join(s.out.Begin(entry), s.out.Leave())
		}
	}
	return s.dir(inner, path, entry)
}

func (s *sender) file(fd int, path, name string) error {
	// Without waiting, should it have become a FIFO meanwhile.
	file, err := dirfd.Open(fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		s.left(path, err)
		return nil
	}
	defer func() { _ = file.Close() }()
	stat, err := fstat(file)
	if err != nil {
		s.left(path, err)
		return nil
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG {
		s.note(Note{Path: path, Text: "left out: it was replaced by " + kindOf(stat.Mode)})
		return nil
	}
	if err := s.out.Begin(entryOf(File, name, &stat)); err != nil {
		return err
	}
	return s.content(file, path, &stat)
}

// left notes that something could not be sent. That it is not there any more is no
// failure: the tree is then as it is without it.
func (s *sender) left(path string, err error) {
	if inner, ok := errors.AsType[*fs.PathError](err); ok {
		err = inner.Err
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		s.note(Note{Path: path, Text: "left out: it vanished"})
		return
	}
	s.note(Note{Path: path, Text: "left out: " + err.Error(), Failed: true})
}

// fail ends a file that can't be read to its end.
func (s *sender) fail(path string, err error) error {
	if inner, ok := errors.AsType[*fs.PathError](err); ok {
		err = inner.Err
	}
	s.left(path, err)
	return s.out.EndFile(err.Error())
}

func entryOf(kind Kind, name string, stat *unix.Stat_t) Entry {
	return Entry{
		Kind:    kind,
		Name:    name,
		Mode:    stat.Mode & 0o7777,
		ModTime: time.Unix(stat.Mtim.Unix()),
		Size:    stat.Size,
	}
}

func kindOf(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "a device"
	}
	return fmt.Sprintf("of the unknown kind %#o", mode&unix.S_IFMT)
}
