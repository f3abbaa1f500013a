package ext4fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Options say how to fill a file system. The zero value takes everything from the tree.
type Options struct {
	// Owner returns whose a file is, by its name in the tree and what the host knows of
	// it. Nil: as on the host.
	Owner func(name string, stat *unix.Stat_t) (uid, gid uint32)
}

// Fill fills an empty file system with a tree. What has holes keeps them. The tree must
// not change meanwhile. A file system that could not be filled is of no use.
func Fill(ctx context.Context, file *os.File, tree string, opts Options) error {
	w, err := NewWriter(file)
	if err != nil {
		return err
	}
	if opts.Owner == nil {
		opts.Owner = func(_ string, stat *unix.Stat_t) (uint32, uint32) { return stat.Uid, stat.Gid }
	}
	f := filler{w: w, tree: tree, opts: opts, linked: map[device]*Node{}}
	root := &Node{} // keeps what mke2fs gave it
	if root.Children, err = f.children(ctx, "."); err != nil {
		return err
	}
	return w.Close(ctx, root)
}

// device names a file on the host.
type device struct{ dev, ino uint64 }

// filler reads a tree of the host.
type filler struct {
	w    *Writer
	tree string
	opts Options
	// linked are the files that have several names on the host.
	linked map[device]*Node
}

// children reads all that is in a directory.
func (f *filler) children(ctx context.Context, name string) (map[string]*Node, error) {
	list, err := os.ReadDir(filepath.Join(f.tree, name))
	if err != nil {
		return nil, err
	}
	children := make(map[string]*Node, len(list))
	for _, one := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		inner := path.Join(name, one.Name())
		if children[one.Name()], err = f.read(ctx, inner); err != nil {
			return nil, fmt.Errorf("%s: %w", inner, err)
		}
	}
	return children, nil
}

// read reads a file, with all that is in it.
func (f *filler) read(ctx context.Context, name string) (*Node, error) {
	var stat unix.Stat_t
	host := filepath.Join(f.tree, name)
	if err := unix.Lstat(host, &stat); err != nil {
		return nil, err
	}
	id := device{stat.Dev, stat.Ino}
	if known := f.linked[id]; known != nil {
		return known, nil
	}
	n := &Node{Mode: stat.Mode, ModTime: time.Unix(stat.Mtim.Unix()), Device: stat.Rdev}
	n.UID, n.GID = f.opts.Owner(name, &stat)
	var err error
	if n.Xattrs, err = readXattrs(host); err != nil {
		return nil, err
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.Children, err = f.children(ctx, name)
		return n, err
	case unix.S_IFREG:
		n.Data, err = f.copy(ctx, host, stat.Size)
	case unix.S_IFLNK:
		n.Link, err = os.Readlink(host)
	}
	if stat.Nlink > 1 {
		f.linked[id] = n
	}
	return n, err
}

// copy copies a file, but for its holes.
func (f *filler) copy(ctx context.Context, host string, size int64) (Data, error) {
	file, err := os.Open(host)
	if err != nil {
		return Data{}, err
	}
	defer func() { _ = file.Close() }()
	data := Data{size: uint64(size)}
	for at := int64(0); at < size; {
		from, to, err := nextData(file, at, size)
		if err != nil {
			return Data{}, err
		}
		if from == to {
			break
		}
		runs, err := f.w.fs.allocate(uint64(to-from+blockSize-1) / blockSize)
		if err != nil {
			return Data{}, err
		}
		part := extentsOf(runs, uint64(from)/blockSize)
		for _, e := range part {
			if err := ctx.Err(); err != nil {
				return Data{}, err
			}
			if err := f.copyRun(file, e, size); err != nil {
				return Data{}, err
			}
		}
		data.extents, at = append(data.extents, part...), to
	}
	return data, nil
}

// nextData finds the next part of a file that is no hole, from a multiple of the block
// size to another one, or the end; there is none if it is empty.
func nextData(file *os.File, at, size int64) (from, to int64, err error) {
	fd := int(file.Fd())
	from, err = unix.Seek(fd, at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size, size, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTSUP): // this file system knows no holes
		return at, size, nil
	case err != nil:
		return 0, 0, err
	}
	if to, err = unix.Seek(fd, from, unix.SEEK_HOLE); err != nil {
		return 0, 0, err
	}
	from = max(from/blockSize*blockSize, at)
	return from, min((to+blockSize-1)/blockSize*blockSize, size), nil
}

// copyRun copies an extent of a file; the kernel does it by itself where it can.
func (f *filler) copyRun(from *os.File, e extent, size int64) error {
	at := int64(e.at) * blockSize
	length := min(int64(e.count)*blockSize, size-at)
	if _, err := from.Seek(at, io.SeekStart); err != nil {
		return err
	}
	if _, err := f.w.fs.file.Seek(int64(e.first)*blockSize, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.CopyN(f.w.fs.file, from, length); errors.Is(err, io.EOF) {
		return errors.New("it became shorter while it was read")
	} else if err != nil {
		return err
	}
	return nil
}
