package hostdir

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// made answers with an entry that put makes in the directory of a request.
func (d *Dir) made(asked *request, put func(dir int, name string) error) (*answer, error) {
	return d.inDir(asked, func(parent *node, dir int, name string) (*answer, error) {
		if err := dirfd.Retry(func() error { return put(dir, name) }); err != nil {
			return nil, err
		}
		return d.entry(parent, dir, name)
	})
}

// newMode is the mode of something new, without set-id bits.
func newMode(mode uint32) uint32 { return mode & (unix.S_ISVTX | 0o777) }

// mknod makes an empty file, a FIFO or a socket. Devices are refused.
func (d *Dir) mknod(_ context.Context, asked *request) (*answer, error) {
	mode := asked.body.u32()
	asked.body.skip(12)
	kind := mode & unix.S_IFMT
	switch kind {
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return nil, unix.EPERM
	}
	return d.made(asked, func(dir int, name string) error { return unix.Mknodat(dir, name, kind|newMode(mode), 0) })
}

func (d *Dir) mkdir(_ context.Context, asked *request) (*answer, error) {
	mode := asked.body.u32()
	asked.body.skip(4)
	return d.made(asked, func(dir int, name string) error { return unix.Mkdirat(dir, name, newMode(mode)) })
}

// symlink makes a link with the guest's text, whatever it is: nothing here follows it.
func (d *Dir) symlink(_ context.Context, asked *request) (*answer, error) {
	return d.made(asked, func(dir int, name string) error {
		target := asked.body.text()
		switch {
		case asked.body.short || target == "":
			return unix.EINVAL
		case len(target) > maxTarget:
			return unix.ENAMETOOLONG
		}
		return unix.Symlinkat(target, dir, name)
	})
}

// hardLink gives a file another name. Directories have one.
func (d *Dir) hardLink(_ context.Context, asked *request) (*answer, error) {
	n, err := d.nodes.get(asked.body.u64())
	if err != nil {
		return nil, err
	}
	if n.kind == unix.S_IFDIR {
		return nil, unix.EPERM
	}
	// Only a file that has a name in the directory still: openNode has found it there.
	fd, err := d.openNode(n)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	return d.made(asked, func(dir int, name string) error {
		return unix.Linkat(unix.AT_FDCWD, procPath(fd), dir, name, unix.AT_SYMLINK_FOLLOW)
	})
}

func (d *Dir) unlink(_ context.Context, asked *request) (*answer, error) { return d.remove(asked, 0) }

func (d *Dir) rmdir(_ context.Context, asked *request) (*answer, error) {
	return d.remove(asked, unix.AT_REMOVEDIR)
}

func (d *Dir) remove(asked *request, flags int) (*answer, error) {
	return d.inDir(asked, func(parent *node, dir int, name string) (*answer, error) {
		st, err := fstatat(dir, name)
		if err != nil {
			return nil, err
		}
		if err := dirfd.Retry(func() error { return unix.Unlinkat(dir, name, flags) }); err != nil {
			return nil, err
		}
		d.nodes.removed(st, parent, name)
		return newAnswer(0), nil
	})
}

// rename renames an entry, over another one or not, or exchanges two.
func (d *Dir) rename(_ context.Context, asked *request) (*answer, error) {
	newParent, flags := asked.body.u64(), uint32(0)
	if asked.op == opRename2 {
		flags = asked.body.u32()
		asked.body.skip(4)
	}
	oldName, err := asked.body.name()
	if err != nil {
		return nil, err
	}
	newName, err := asked.body.name()
	if err != nil {
		return nil, err
	}
	if flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return nil, unix.EINVAL
	}
	from, fromDir, err := d.openDir(asked.node)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fromDir) }()
	to, toDir, err := d.openDir(newParent)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(toDir) }()
	old, err := fstatat(fromDir, oldName)
	if err != nil {
		return nil, err
	}
	replaced, replacedErr := fstatat(toDir, newName)
	if err := dirfd.Retry(func() error {
		return unix.Renameat2(fromDir, oldName, toDir, newName, uint(flags))
	}); err != nil {
		return nil, err
	}
	exchanged := flags&unix.RENAME_EXCHANGE != 0
	if replacedErr == nil && !exchanged && idOf(replaced) != idOf(old) {
		d.nodes.removed(replaced, to, newName)
	}
	d.nodes.moved(idOf(old), from, oldName, to, newName)
	if exchanged && replacedErr == nil {
		d.nodes.moved(idOf(replaced), to, newName, from, oldName)
	}
	return newAnswer(0), nil
}

// removed notes that a name of a file is gone. If it was the last one, the host may give the file's
// number to another, which is to be another node: the guest's kernel knows that this one is dead.
func (t *table) removed(st *unix.Stat_t, parent *node, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.byFile[idOf(st)]
	if n == nil {
		return
	}
	t.unlink(n, link{parent, name})
	if st.Nlink <= 1 || n.kind == unix.S_IFDIR {
		delete(t.byFile, n.file)
	}
}
