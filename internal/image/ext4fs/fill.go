package ext4fs

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Options say how to fill a file system. The zero value takes everything from the tree.
type Options struct {
	// Owner returns whose a file is, by its name in the tree and what the host knows of
	// it. Nil: as on the host.
	Owner func(name string, stat *unix.Stat_t) (uid, gid uint32)
}

// lostFound is a directory that mke2fs makes.
const lostFound = "lost+found"

// Fill fills an empty file system with a tree. What has holes keeps them. The tree must
// not change meanwhile. A file system that could not be filled is of no use.
func Fill(ctx context.Context, file *os.File, tree string, opts Options) error {
	target, err := open(file)
	if err != nil {
		return err
	}
	if opts.Owner == nil {
		opts.Owner = func(_ string, stat *unix.Stat_t) (uint32, uint32) { return stat.Uid, stat.Gid }
	}
	f := filler{fileSystem: target, tree: tree, opts: opts, linked: map[device]*inode{}}
	if err := f.root(ctx); err != nil {
		return err
	}
	// Their number of links is known now.
	for _, i := range f.linked {
		if err := target.writeInode(i); err != nil {
			return err
		}
	}
	return target.close()
}

// device names a file on the host.
type device struct{ dev, ino uint64 }

type filler struct {
	*fileSystem
	tree string
	opts Options
	// linked are the files that have several names on the host.
	linked map[device]*inode
}

// root fills the root directory, which is there already, with lost+found in it.
func (f *filler) root(ctx context.Context) error {
	entries, err := f.children(ctx, ".", rootInode, []entry{{f.nextInode - 1, kindOf(unix.S_IFDIR), lostFound}})
	if err != nil {
		return err
	}
	i, blocks, err := f.readDir(rootInode)
	if err != nil {
		return err
	}
	i.links = 2 + directories(entries)
	return f.writeDir(i, entries, blocks)
}

// readDir reads the inode of a directory that mke2fs has made, and where it is.
func (f *filler) readDir(number uint32) (*inode, []run, error) {
	le := binary.LittleEndian
	b := make([]byte, inodeSize)
	if _, err := f.file.ReadAt(b, f.inodeAt(number)); err != nil {
		return nil, nil, err
	}
	i := &inode{number: number, mode: le.Uint16(b), uid: uint32(le.Uint16(b[0x02:])), gid: uint32(le.Uint16(b[0x18:])),
		links: uint32(le.Uint16(b[0x1a:])), modified: time.Unix(int64(le.Uint32(b[0x10:])), 0)}
	content := b[0x28:]
	if le.Uint16(content) != extentsMagic || le.Uint16(content[6:]) != 0 {
		return nil, nil, errors.New("a directory of the file system is not as expected")
	}
	var runs []run
	for n := range int(min(le.Uint16(content[2:]), inodeRecords)) {
		record := content[recordSize*(n+1):]
		runs = append(runs, run{uint64(le.Uint32(record[8:])) | uint64(le.Uint16(record[6:]))<<32, uint64(le.Uint16(record[4:]))})
	}
	return i, runs, nil
}

// children makes all that is in a directory, and returns its entries.
func (f *filler) children(ctx context.Context, name string, number uint32, entries []entry) ([]entry, error) {
	// The root is its own parent; others correct that.
	entries = append([]entry{{number, kindOf(unix.S_IFDIR), "."}, {number, kindOf(unix.S_IFDIR), ".."}}, entries...)
	list, err := os.ReadDir(filepath.Join(f.tree, name))
	if err != nil {
		return nil, err
	}
	for _, one := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		inner := path.Join(name, one.Name())
		if inner == lostFound && one.IsDir() {
			if err := f.fillLostFound(ctx); err != nil {
				return nil, err
			}
			continue
		}
		made, err := f.make(ctx, inner, number)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", inner, err)
		}
		entries = append(entries, entry{made.number, kindOf(uint32(made.mode)), one.Name()})
	}
	return entries, nil
}

// fillLostFound fills lost+found, if there is something in that of the tree.
func (f *filler) fillLostFound(ctx context.Context) error {
	number := binary.LittleEndian.Uint32(f.super[0x54:])
	entries, err := f.children(ctx, lostFound, number, nil)
	if err != nil || len(entries) == 2 {
		return err
	}
	entries[1].number = rootInode
	i, blocks, err := f.readDir(number)
	if err != nil {
		return err
	}
	i.links = 2 + directories(entries)
	return f.writeDir(i, entries, blocks)
}

// directories counts the directories among entries, but for "." and "..".
func directories(entries []entry) (count uint32) {
	for _, e := range entries[2:] {
		if e.kind == kindOf(unix.S_IFDIR) {
			count++
		}
	}
	return count
}

// make makes a file, with all that is in it.
func (f *filler) make(ctx context.Context, name string, parent uint32) (*inode, error) {
	var stat unix.Stat_t
	host := filepath.Join(f.tree, name)
	if err := unix.Lstat(host, &stat); err != nil {
		return nil, err
	}
	isDir := stat.Mode&unix.S_IFMT == unix.S_IFDIR
	id := device{stat.Dev, stat.Ino}
	if known := f.linked[id]; known != nil {
		known.links++
		return known, nil
	}
	number, err := f.newInode(isDir)
	if err != nil {
		return nil, err
	}
	i := &inode{number: number, mode: uint16(stat.Mode), links: 1, modified: time.Unix(stat.Mtim.Unix())}
	i.uid, i.gid = f.opts.Owner(name, &stat)
	if err := f.addXattrs(i, host); err != nil {
		return nil, err
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return i, f.directory(ctx, i, name, parent)
	case unix.S_IFREG:
		err = f.regular(ctx, i, host, uint64(stat.Size))
	case unix.S_IFLNK:
		err = f.link(i, host)
	case unix.S_IFCHR, unix.S_IFBLK:
		setDevice(i, stat.Rdev)
	}
	if err != nil {
		return nil, err
	}
	if stat.Nlink > 1 {
		f.linked[id] = i // written in the end
		return i, nil
	}
	return i, f.writeInode(i)
}

func (f *filler) directory(ctx context.Context, i *inode, name string, parent uint32) error {
	entries, err := f.children(ctx, name, i.number, nil)
	if err != nil {
		return err
	}
	entries[1].number = parent
	i.links = 2 + directories(entries)
	return f.writeDir(i, entries, nil)
}

// writeDir writes a directory, to the blocks that it has first.
func (f *filler) writeDir(i *inode, entries []entry, has []run) error {
	if i.links >= maxLinks {
		i.links = 1
	}
	had := uint64(0)
	for _, r := range has {
		had += r.count
	}
	content := f.dirBlocks(i.number, entries, int(had))
	i.size = uint64(len(content))
	more, err := f.allocate(i.size/blockSize - had)
	if err != nil {
		return err
	}
	extents := extentsOf(append(slices.Clone(has), more...), 0)
	for _, e := range extents {
		if _, err := f.file.WriteAt(content[e.at*blockSize:][:e.count*blockSize], int64(e.first)*blockSize); err != nil {
			return err
		}
	}
	if err := f.setExtents(i, extents); err != nil {
		return err
	}
	return f.writeInode(i)
}

// extentsOf puts runs one after the other, from a block of the file on.
func extentsOf(runs []run, at uint64) []extent {
	var extents []extent
	for _, r := range runs {
		extents = append(extents, extent{at, r})
		at += r.count
	}
	return extents
}

// regular copies a file, but for its holes.
func (f *filler) regular(ctx context.Context, i *inode, host string, size uint64) error {
	file, err := os.Open(host)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	i.size = size
	var extents []extent
	for at := int64(0); at < int64(size); {
		from, to, err := nextData(file, at, int64(size))
		if err != nil {
			return err
		}
		if from == to {
			break
		}
		runs, err := f.allocate(uint64(to-from+blockSize-1) / blockSize)
		if err != nil {
			return err
		}
		part := extentsOf(runs, uint64(from)/blockSize)
		for _, e := range part {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f.copyRun(file, e, int64(size)); err != nil {
				return err
			}
		}
		extents, at = append(extents, part...), to
	}
	return f.setExtents(i, extents)
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
	if _, err := f.file.Seek(int64(e.first)*blockSize, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.CopyN(f.file, from, length); errors.Is(err, io.EOF) {
		return errors.New("it became shorter while it was read")
	} else if err != nil {
		return err
	}
	return nil
}

// link writes a symbolic link.
func (f *filler) link(i *inode, host string) error {
	target, err := os.Readlink(host)
	if err != nil {
		return err
	}
	i.size = uint64(len(target))
	if len(target) < len(i.content) {
		copy(i.content[:], target)
		return nil
	}
	block := make([]byte, blockSize)
	if copy(block, target) == blockSize {
		return fs.ErrInvalid // no kernel makes such a link
	}
	runs, err := f.allocate(1)
	if err != nil {
		return err
	}
	if _, err := f.file.WriteAt(block, int64(runs[0].first)*blockSize); err != nil {
		return err
	}
	return f.setExtents(i, extentsOf(runs, 0))
}

// setDevice has an inode name a device, in the kernel's old encoding if it fits.
func setDevice(i *inode, dev uint64) {
	major, minor := unix.Major(dev), unix.Minor(dev)
	if major < 256 && minor < 256 {
		binary.LittleEndian.PutUint32(i.content[:], major<<8|minor)
		return
	}
	binary.LittleEndian.PutUint32(i.content[4:], minor&0xff|major<<8|(minor&^0xff)<<12)
}

// kindOf returns a file's type as directories have it.
func kindOf(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	}
	return 0
}

// byKey orders attributes as ext4 wants them in a block.
func byKey(a, b xattr) int {
	return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
}
