package hostdir

import (
	"bytes"
	"context"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
)

// xattrPrefix is that of the extended attributes that are shared with the guest: those of users.
// The others are the host's own.
const xattrPrefix = "user."

// xattrName reads the name of an extended attribute. An error of the operation is returned as
// unshared for one that is not shared.
func (d *Dir) xattrName(body *fields, unshared error) (string, error) {
	if d.opts.NoXattr {
		return "", unix.ENOSYS
	}
	name := body.text()
	switch {
	case body.short:
		return "", unix.EINVAL
	case !strings.HasPrefix(name, xattrPrefix):
		return "", unshared
	case len(name) > maxName:
		return "", unix.ERANGE
	}
	return name, nil
}

// withXattrs calls do with a path of a node. Only files and directories have such attributes.
func (d *Dir) withXattrs(id uint64, do func(path string) error) error {
	n, err := d.nodes.get(id)
	if err != nil {
		return err
	}
	if n.kind != unix.S_IFREG && n.kind != unix.S_IFDIR {
		return unix.ENODATA
	}
	return d.withNode(n, 0, func(fd int) error { return dirfd.Retry(func() error { return do(procPath(fd)) }) })
}

// sized answers with a value, or with its size if no room for it was given.
func sized(value []byte, room uint32) (*answer, error) {
	a := newAnswer(max(8, len(value)))
	switch {
	case room == 0:
		a.u32(uint32(len(value)))
		a.u32(0)
	case len(value) > int(room):
		return nil, unix.ERANGE
	default:
		a.raw(value)
	}
	return a, nil
}

func (d *Dir) getxattr(_ context.Context, asked *request) (*answer, error) {
	room := asked.body.u32()
	asked.body.skip(4)
	name, err := d.xattrName(&asked.body, unix.ENODATA)
	if err != nil {
		return nil, err
	}
	var value []byte
	err = d.withXattrs(asked.node, func(path string) error {
		space := make([]byte, maxXattr)
		n, err := unix.Getxattr(path, name, space)
		value = space[:max(n, 0)]
		return err
	})
	if err != nil {
		return nil, err
	}
	return sized(value, room)
}

func (d *Dir) listxattr(_ context.Context, asked *request) (*answer, error) {
	if d.opts.NoXattr {
		return nil, unix.ENOSYS
	}
	room := asked.body.u32()
	var shared []byte
	err := d.withXattrs(asked.node, func(path string) error {
		space := make([]byte, maxXattr)
		n, err := unix.Listxattr(path, space)
		for name := range bytes.SplitSeq(space[:max(n, 0)], []byte{0}) {
			if bytes.HasPrefix(name, []byte(xattrPrefix)) {
				shared = append(append(shared, name...), 0)
			}
		}
		return err
	})
	if err != nil && err != unix.ENODATA && err != unix.EOPNOTSUPP { //nolint:errorlint // bare
		return nil, err
	}
	return sized(shared, room)
}

func (d *Dir) setxattr(_ context.Context, asked *request) (*answer, error) {
	size, flags := asked.body.u32(), asked.body.u32()
	name, err := d.xattrName(&asked.body, unix.EOPNOTSUPP)
	if err != nil {
		return nil, err
	}
	value := asked.body.take(int(size))
	if asked.body.short || size > maxXattr || flags&^(unix.XATTR_CREATE|unix.XATTR_REPLACE) != 0 {
		return nil, unix.EINVAL
	}
	return nil, d.withXattrs(asked.node, func(path string) error { return unix.Setxattr(path, name, value, int(flags)) })
}

func (d *Dir) removexattr(_ context.Context, asked *request) (*answer, error) {
	name, err := d.xattrName(&asked.body, unix.ENODATA)
	if err != nil {
		return nil, err
	}
	return nil, d.withXattrs(asked.node, func(path string) error { return unix.Removexattr(path, name) })
}
