package hostdir

import (
	"context"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// maxHandles bounds how many files and directories a guest may have open in one directory.
const maxHandles = 8192

// handle is a file or directory that the guest has open.
type handle struct {
	id   uint64
	node *node
	fd   int

	users sync.WaitGroup // of fd
	// reading is the state of a directory that is read.
	reading reading
}

func (h *handle) done() { h.users.Done() }

// handles are those that a guest has.
type handles struct {
	mu   sync.Mutex
	open map[uint64]*handle
	last uint64
	// byNode are the handles of a node, by which one without a name is reached.
	byNode map[*node][]*handle
}

// add adds a handle, which owns fd from then on. On failure fd is closed.
func (t *handles) add(n *node, fd int) (*handle, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.open) >= maxHandles {
		_ = unix.Close(fd)
		return nil, unix.ENFILE
	}
	if t.open == nil {
		t.open, t.byNode = map[uint64]*handle{}, map[*node][]*handle{}
	}
	t.last++
	h := &handle{id: t.last, node: n, fd: fd}
	t.open[h.id] = h
	t.byNode[n] = append(t.byNode[n], h)
	return h, nil
}

// use returns a handle of a node that the guest names. It is not closed before it is done with.
func (t *handles) use(id uint64, n *node) (*handle, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.open[id]
	if h == nil || h.node != n {
		return nil, unix.EBADF
	}
	h.users.Add(1)
	return h, nil
}

// of returns any handle of a node, as use does; nil: there is none.
func (t *handles) of(n *node) *handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := t.byNode[n]
	if len(all) == 0 {
		return nil
	}
	h := all[len(all)-1]
	h.users.Add(1)
	return h
}

// remove takes a handle out, and closes it when nobody uses it any more.
func (t *handles) remove(id uint64, n *node) error {
	t.mu.Lock()
	h := t.open[id]
	if h == nil || h.node != n {
		t.mu.Unlock()
		return unix.EBADF
	}
	t.drop(h)
	t.mu.Unlock()
	h.users.Wait()
	return unix.Close(h.fd)
}

// drop takes a handle out. The lock is held.
func (t *handles) drop(h *handle) {
	delete(t.open, h.id)
	rest := t.byNode[h.node]
	for i, other := range rest {
		if other == h {
			rest = append(rest[:i:i], rest[i+1:]...)
			break
		}
	}
	if len(rest) == 0 {
		delete(t.byNode, h.node)
		return
	}
	t.byNode[h.node] = rest
}

func (t *handles) closeAll() {
	t.mu.Lock()
	open := t.open
	t.open, t.byNode = nil, nil
	t.mu.Unlock()
	for _, h := range open {
		h.users.Wait()
		_ = unix.Close(h.fd)
	}
}

// withHandle calls do with the handle that a request names.
func (d *Dir) withHandle(asked *request, id uint64, do func(h *handle) error) error {
	n, err := d.nodes.get(asked.node)
	if err != nil {
		return err
	}
	h, err := d.handles.use(id, n)
	if err != nil {
		return err
	}
	defer h.done()
	return do(h)
}

func (d *Dir) release(_ context.Context, asked *request) (*answer, error) {
	id := asked.body.u64()
	n, err := d.nodes.get(asked.node)
	if err != nil {
		return nil, err
	}
	return nil, d.handles.remove(id, n)
}

func (d *Dir) fsync(_ context.Context, asked *request) (*answer, error) {
	id, flags := asked.body.u64(), asked.body.u32()
	return nil, d.withHandle(asked, id, func(h *handle) error {
		if flags&fsyncData != 0 {
			return dirfd.Retry(func() error { return unix.Fdatasync(h.fd) })
		}
		return dirfd.Retry(func() error { return unix.Fsync(h.fd) })
	})
}
