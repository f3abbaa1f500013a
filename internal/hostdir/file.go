package hostdir

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// keptFlags are the flags of an open that the host's file gets as well. The guest's kernel does
// what the others ask for.
const keptFlags = unix.O_ACCMODE | unix.O_APPEND | unix.O_TRUNC | unix.O_SYNC | unix.O_DSYNC

// writes reports whether a file opened with flags can be written to.
func writes(flags uint32) bool {
	return flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0
}

// reopen opens what an O_PATH descriptor stands for, which must be a regular file.
func (d *Dir) reopen(path int, flags uint32) (fd int, err error) {
	st, err := fstat(path)
	switch {
	case err != nil:
		return -1, err
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return -1, unix.EPERM
	case writes(flags) && d.opts.ReadOnly:
		return -1, unix.EROFS
	case writes(flags):
		if err := d.clearSetID(path); err != nil {
			return -1, err
		}
	}
	mode := int(flags&keptFlags) | unix.O_CLOEXEC | unix.O_NOCTTY | unix.O_NONBLOCK
	err = dirfd.Retry(func() (err error) {
		fd, err = unix.Open(procPath(path), mode, 0)
		return err
	})
	return fd, err
}

func (d *Dir) open(_ context.Context, asked *request) (*answer, error) {
	flags := asked.body.u32()
	if asked.node == probeID {
		a := newAnswer(16)
		a.zero(16)
		return a, nil
	}
	n, err := d.nodes.get(asked.node)
	if err != nil {
		return nil, err
	}
	if n.kind != unix.S_IFREG {
		return nil, unix.EPERM
	}
	// By its name only: a file that has none any more may still be open.
	path, err := d.openNode(n)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(path) }()
	fd, err := d.reopen(path, flags)
	if err != nil {
		return nil, err
	}
	return d.opened(n, fd, d.keepsCache(n, fd))
}

// keepsCache reports whether what the guest's kernel has read of a file is still right. If not it
// is also told to ask for the attributes again, before the answer to the open.
func (d *Dir) keepsCache(n *node, fd int) bool {
	st, err := fstat(fd)
	if err != nil {
		return false
	}
	d.nodes.mu.Lock()
	before := n.told
	d.nodes.mu.Unlock()
	if before.same(st) {
		return before.settled()
	}
	d.invalidate(n)
	return false
}

// invalidate has the guest's kernel ask for a file's attributes again. What it has read of the
// file it drops itself when they have changed.
func (d *Dir) invalidate(n *node) {
	a := newAnswer(24)
	a.u64(n.id)
	a.u64(^uint64(0)) // the attributes only
	a.u64(0)
	d.send(a.seal(0, notifyInode))
}

// opened answers with a handle of an open file.
func (d *Dir) opened(n *node, fd int, keep bool) (*answer, error) {
	h, err := d.handles.add(n, fd)
	if err != nil {
		return nil, err
	}
	a := newAnswer(16)
	d.putOpen(a, h, keep)
	return a, nil
}

func (d *Dir) putOpen(a *answer, h *handle, keep bool) {
	var flags uint32
	if keep {
		flags |= openKeepCache
	}
	a.u64(h.id)
	a.u32(flags)
	a.u32(0)
}

// create makes a file and opens it. One that is there is opened, unless O_EXCL is given.
func (d *Dir) create(_ context.Context, asked *request) (*answer, error) {
	flags, mode := asked.body.u32(), asked.body.u32()
	asked.body.skip(8)
	return d.inDir(asked, func(parent *node, dir int, name string) (*answer, error) {
		fd, err := d.createIn(dir, name, flags, newMode(mode))
		if err != nil {
			return nil, err
		}
		return d.created(parent, name, fd)
	})
}

// created answers with a file that was made and opened.
func (d *Dir) created(parent *node, name string, fd int) (*answer, error) {
	st, err := fstat(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	n, err := d.nodes.found(parent, name, st)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	h, err := d.handles.add(n, fd)
	if err != nil {
		d.nodes.forget(n.id, 1)
		return nil, err
	}
	a := newAnswer(entrySize + 16)
	d.putEntry(a, n, st)
	d.putOpen(a, h, false)
	return a, nil
}

func (d *Dir) createIn(dir int, name string, flags, mode uint32) (fd int, err error) {
	making := int(flags&keptFlags) | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	err = dirfd.Retry(func() (err error) {
		fd, err = unix.Openat(dir, name, making, mode)
		return err
	})
	if err != unix.EEXIST || flags&unix.O_EXCL != 0 { //nolint:errorlint // bare
		return fd, err
	}
	path, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(path) }()
	return d.reopen(path, flags)
}

func (d *Dir) read(ctx context.Context, asked *request) (*answer, error) {
	id, offset, size := asked.body.u64(), int64(asked.body.u64()), int64(asked.body.u32())
	if size > maxIO || offset < 0 {
		return nil, unix.EINVAL
	}
	if err := d.memory.Acquire(ctx, size); err != nil {
		return nil, unix.EIO
	}
	asked.cost += size // until the answer has been sent
	a := newAnswer(int(size))
	err := d.withHandle(asked, id, func(h *handle) error {
		data := a.bytes[answerHeader : answerHeader+int(size)]
		done := 0
		for done < len(data) { // a short answer is the end of the file
			var n int
			err := dirfd.Retry(func() (err error) {
				n, err = unix.Pread(h.fd, data[done:], offset+int64(done))
				return err
			})
			if done += max(n, 0); err != nil && done == 0 {
				return err
			}
			if n <= 0 {
				break
			}
		}
		a.bytes = a.bytes[:answerHeader+done]
		return nil
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

func (d *Dir) write(_ context.Context, asked *request) (*answer, error) {
	id, offset, size := asked.body.u64(), int64(asked.body.u64()), asked.body.u32()
	asked.body.skip(20)
	data := asked.body.take(int(size))
	if asked.body.short || offset < 0 {
		return nil, unix.EINVAL
	}
	if err := d.room.Take(d.root, int64(size)); err != nil {
		return nil, err
	}
	done := 0
	err := d.withHandle(asked, id, func(h *handle) error {
		defer d.nodes.wrote(h.node)
		for done < len(data) {
			var n int
			err := dirfd.Retry(func() (err error) {
				n, err = unix.Pwrite(h.fd, data[done:], offset+int64(done))
				return err
			})
			if err != nil {
				return err
			}
			done += n
		}
		return nil
	})
	if err != nil && done == 0 {
		return nil, err
	}
	a := newAnswer(8)
	a.u32(uint32(done))
	a.u32(0)
	return a, nil
}

func (d *Dir) fallocate(_ context.Context, asked *request) (*answer, error) {
	id, offset, length, mode := asked.body.u64(), int64(asked.body.u64()), int64(asked.body.u64()), asked.body.u32()
	if mode&unix.FALLOC_FL_PUNCH_HOLE == 0 {
		if err := d.room.Take(d.root, max(length, 0)); err != nil {
			return nil, err
		}
	}
	return nil, d.withHandle(asked, id, func(h *handle) error {
		return dirfd.Retry(func() error { return unix.Fallocate(h.fd, mode, offset, length) })
	})
}

func (d *Dir) lseek(_ context.Context, asked *request) (*answer, error) {
	id, offset, whence := asked.body.u64(), int64(asked.body.u64()), int(asked.body.u32())
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return nil, unix.EINVAL // the others the guest's kernel does itself
	}
	var at int64
	err := d.withHandle(asked, id, func(h *handle) (err error) {
		at, err = unix.Seek(h.fd, offset, whence)
		return err
	})
	if err != nil {
		return nil, err
	}
	a := newAnswer(8)
	a.u64(uint64(at))
	return a, nil
}

// copyFileRange copies between two files without the guest having to move the bytes.
func (d *Dir) copyFileRange(_ context.Context, asked *request) (*answer, error) {
	from, fromOffset := asked.body.u64(), int64(asked.body.u64())
	toNode, to, toOffset := asked.body.u64(), asked.body.u64(), int64(asked.body.u64())
	length := min(asked.body.u64(), maxCopy)
	if err := d.room.Take(d.root, int64(length)); err != nil {
		return nil, err
	}
	n, err := d.nodes.get(toNode)
	if err != nil {
		return nil, err
	}
	target, err := d.handles.use(to, n)
	if err != nil {
		return nil, err
	}
	defer target.done()
	copied := 0
	err = d.withHandle(asked, from, func(h *handle) error {
		return dirfd.Retry(func() (err error) {
			copied, err = unix.CopyFileRange(h.fd, &fromOffset, target.fd, &toOffset, int(length), 0)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	a := newAnswer(8)
	a.u32(uint32(copied))
	a.u32(0)
	return a, nil
}

// maxCopy bounds what one request copies, in bytes: others are to have their turn.
const maxCopy = 64 << 20
