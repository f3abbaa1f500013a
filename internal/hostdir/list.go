package hostdir

import (
	"bytes"
	"context"
	"encoding/binary"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// reading is a directory that is being read.
type reading struct {
	mu     sync.Mutex
	at     int64  // the position of what is in buffer, as the host's kernel has it
	buffer []byte // entries that were read, and not yet given to the guest
}

// direntHeader is the size of struct linux_dirent64 up to the name.
const direntHeader = 19

// dirent is an entry as the host's kernel lists it.
type dirent struct {
	ino  uint64
	next int64 // the position after it
	kind byte
	name []byte
}

// next takes the next entry out of what was read; false: there is none.
func (r *reading) next() (dirent, bool) {
	if len(r.buffer) < direntHeader {
		return dirent{}, false
	}
	size := int(binary.NativeEndian.Uint16(r.buffer[16:]))
	if size < direntHeader || size > len(r.buffer) {
		return dirent{}, false
	}
	e := dirent{
		ino:  binary.NativeEndian.Uint64(r.buffer),
		next: int64(binary.NativeEndian.Uint64(r.buffer[8:])),
		kind: r.buffer[18],
		name: r.buffer[direntHeader:size],
	}
	if end := bytes.IndexByte(e.name, 0); end >= 0 {
		e.name = e.name[:end]
	}
	return e, true
}

// skip drops the entry that next has returned.
func (r *reading) skip(e dirent) {
	r.buffer = r.buffer[binary.NativeEndian.Uint16(r.buffer[16:]):]
	r.at = e.next
}

// fill reads entries at a position.
func (r *reading) fill(fd int, at int64) error {
	if at != r.at {
		if _, err := unix.Seek(fd, at, 0); err != nil {
			return err
		}
		r.buffer, r.at = nil, at
	}
	if len(r.buffer) > 0 {
		return nil
	}
	const enough = 32 << 10
	space := make([]byte, enough)
	n := 0
	err := dirfd.Retry(func() (err error) {
		n, err = unix.ReadDirent(fd, space)
		return err
	})
	r.buffer = space[:max(n, 0)]
	return err
}

func (d *Dir) opendir(_ context.Context, asked *request) (*answer, error) {
	n, path, err := d.openDir(asked.node)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(path) }()
	fd, err := unix.Openat(path, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return d.opened(n, fd, false)
}

// readdir lists entries, with their attributes if it is asked for them.
func (d *Dir) readdir(_ context.Context, asked *request) (*answer, error) {
	id, offset, size := asked.body.u64(), int64(asked.body.u64()), int(asked.body.u32())
	if size > maxIO {
		return nil, unix.EINVAL
	}
	size = min(size, 64<<10)
	a := newAnswer(size)
	err := d.withHandle(asked, id, func(h *handle) error {
		if h.node.kind != unix.S_IFDIR {
			return unix.ENOTDIR
		}
		if asked.op == opReaddirplus {
			d.watch(h.node, h.fd)
		}
		h.reading.mu.Lock()
		defer h.reading.mu.Unlock()
		if offset == 0 {
			h.reading.at = -1 // from the beginning, with what is new
		}
		return d.list(a, h, offset, size, asked.op == opReaddirplus)
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// list adds entries from a position on, as many as fit.
func (d *Dir) list(a *answer, h *handle, at int64, size int, plus bool) error {
	for {
		if err := h.reading.fill(h.fd, at); err != nil {
			if a.size() > 0 {
				return nil
			}
			return err
		}
		if len(h.reading.buffer) == 0 {
			return nil
		}
		for {
			e, ok := h.reading.next()
			if !ok {
				break
			}
			need := (24 + len(e.name) + 7) &^ 7
			if plus {
				need += entrySize
			}
			if a.size()+need > size {
				return nil
			}
			d.putDirent(a, h, e, plus)
			h.reading.skip(e)
		}
		h.reading.buffer = nil
		at = h.reading.at
	}
}

// putDirent adds a struct fuse_dirent, or fuse_direntplus.
func (d *Dir) putDirent(a *answer, h *handle, e dirent, plus bool) {
	name := string(e.name)
	if plus && !d.putListed(a, h, name) {
		a.zero(entrySize) // the guest looks it up itself, if it wants it
	}
	a.u64(e.ino)
	a.u64(uint64(e.next))
	a.u32(uint32(len(name)))
	a.u32(uint32(e.kind))
	a.raw(e.name)
	a.zero(-len(name) & 7)
}

// putListed adds the attributes of an entry, which the guest knows from then on.
func (d *Dir) putListed(a *answer, h *handle, name string) bool {
	if name == "." || name == ".." {
		return false
	}
	st, err := d.entryIn(h.node, h.fd, name)
	if err != nil {
		return false
	}
	n, err := d.nodes.found(h.node, name, st)
	if err != nil {
		return false
	}
	d.putEntry(a, n, st)
	return true
}
