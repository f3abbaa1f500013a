package ext4fs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lostFound is a directory that mke2fs makes.
const lostFound = "lost+found"

// Node is a file of the tree that a file system is filled with. One that is in several
// directories, or in one by several names, has so many hard links.
type Node struct {
	// Mode is its type and permissions, as in stat(2). Zero for the root: as mke2fs made it.
	Mode     uint32
	UID, GID uint32
	ModTime  time.Time
	// Device is the device that a device's file stands for, as in stat(2).
	Device uint64
	// Link is what a symbolic link leads to.
	Link string
	// Xattrs are its extended attributes, by their whole names, as getxattr(2) has them. Those
	// that ext4 has no number for are left out.
	Xattrs map[string][]byte
	// Data is the content of a regular file.
	Data Data
	// Children is what is in a directory, by name.
	Children map[string]*Node

	inode *inode // once it has one
}

// IsDir reports whether it is a directory.
func (n *Node) IsDir() bool { return n.Mode&unix.S_IFMT == unix.S_IFDIR }

// Data is the content of a regular file, which is in the file system already. The zero value
// is empty.
type Data struct {
	size    uint64
	extents []extent
	place   int64
}

// DataAt returns content that is not in a file system: who has it keeps it in a place of its own.
// It is for trees that are read, and that no [Writer] is given.
func DataAt(place, size int64) Data { return Data{size: uint64(size), place: place} }

// Place returns the place that [DataAt] was given.
func (d Data) Place() int64 { return d.place }

// Size returns its length in bytes.
func (d Data) Size() int64 { return int64(d.size) }

// Sized returns the content of a file of a size, in bytes, that is in no file system: for trees
// that are only looked at.
func Sized(size int64) Data { return Data{size: uint64(size)} }

// maxName is the longest name of a file, in bytes.
const maxName = 255

// Writer fills an empty file system, as mke2fs makes it: first with the content of files, in
// the order in which it comes, then with the tree.
type Writer struct {
	fs *fileSystem
	// pending is data to be written from a block on: files follow each other on the disk, and
	// most are small.
	pending      []byte
	pendingBlock uint64
}

// maxPending is how much data is written at once, in bytes.
const maxPending = 1 << 20

// NewWriter begins to fill a file system. One that was not filled to the end is of no use.
func NewWriter(file *os.File) (*Writer, error) {
	fs, err := open(file)
	if err != nil {
		return nil, err
	}
	return &Writer{fs: fs, pending: make([]byte, 0, maxPending)}, nil
}

// Add stores the content of a file, which has that size, in bytes. Blocks of zeros become
// holes. The error matches [ErrNoSpace] if there is no room.
func (w *Writer) Add(r io.Reader, size int64) (Data, error) {
	data := Data{size: uint64(size)}
	buffer := make([]byte, min(size+blockSize-1, maxPending)/blockSize*blockSize)
	for at := int64(0); at < size; {
		part := buffer[:min(int64(len(buffer)), size-at)]
		if _, err := io.ReadFull(r, part); err != nil {
			return Data{}, err
		}
		whole := buffer[:(len(part)+blockSize-1)/blockSize*blockSize]
		clear(whole[len(part):])
		if err := w.addBlocks(&data, uint64(at)/blockSize, whole); err != nil {
			return Data{}, err
		}
		at += int64(len(part))
	}
	return data, nil
}

// addBlocks stores blocks of a file, from one of its blocks on, but for those of zeros.
func (w *Writer) addBlocks(data *Data, at uint64, blocks []byte) error {
	isHole := func(i int) bool { return isZero(blocks[i*blockSize:][:blockSize]) }
	count := len(blocks) / blockSize
	for i := 0; i < count; {
		if isHole(i) {
			i++
			continue
		}
		end := i + 1
		for end < count && !isHole(end) {
			end++
		}
		runs, err := w.fs.allocate(uint64(end - i))
		if err != nil {
			return err
		}
		for _, e := range extentsOf(runs, at+uint64(i)) {
			if err := w.write(e.first, blocks[(e.at-at)*blockSize:][:e.count*blockSize]); err != nil {
				return err
			}
			data.append(e)
		}
		i = end
	}
	return nil
}

// append adds an extent, to the last one if it goes on where that ends.
func (d *Data) append(e extent) {
	if n := len(d.extents); n > 0 {
		last := &d.extents[n-1]
		if last.at+last.count == e.at && last.first+last.count == e.first && last.count+e.count <= maxRun {
			last.count += e.count
			return
		}
	}
	d.extents = append(d.extents, e)
}

func isZero(block []byte) bool {
	// Most blocks that are not zero begin so.
	return block[0] == 0 && bytes.Equal(block[1:], block[:len(block)-1])
}

// write writes blocks, together with what is before them.
func (w *Writer) write(block uint64, blocks []byte) error {
	if next := w.pendingBlock + uint64(len(w.pending))/blockSize; block != next || len(w.pending)+len(blocks) > maxPending {
		if err := w.flush(); err != nil {
			return err
		}
		w.pendingBlock = block
	}
	w.pending = append(w.pending, blocks...)
	return nil
}

func (w *Writer) flush() error {
	_, err := w.fs.file.WriteAt(w.pending, int64(w.pendingBlock)*blockSize)
	w.pending = w.pending[:0]
	return err
}

// Free gives up the content of a file that is not in the tree any more.
func (w *Writer) Free(data Data) error {
	if len(data.extents) == 0 {
		return nil
	}
	if err := w.flush(); err != nil { // it may be in there
		return err
	}
	for _, e := range data.extents {
		w.fs.free(e.run)
		// Where the host's file system has no holes, it stays, and is overwritten in time.
		const how = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
		err := unix.Fallocate(int(w.fs.file.Fd()), how, int64(e.first)*blockSize, int64(e.count)*blockSize)
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	return nil
}

// Close writes the tree. The file stays open. The error matches [ErrNoInodes] or [ErrNoSpace]
// if there is no room for it.
func (w *Writer) Close(ctx context.Context, root *Node) error {
	if err := w.flush(); err != nil {
		return err
	}
	t := treeWriter{fileSystem: w.fs, ctx: ctx}
	if err := t.root(root); err != nil {
		return err
	}
	// Their number of links is known now.
	for _, i := range t.files {
		if i.links > maxLinks {
			return fmt.Errorf("a file has %d names, more than %d", i.links, maxLinks)
		}
		if err := w.fs.writeInode(i); err != nil {
			return err
		}
	}
	return w.fs.close()
}

// treeWriter writes a tree whose files have their content.
type treeWriter struct {
	*fileSystem
	ctx   context.Context // of the call that it is for
	files []*inode        // all but directories
}

// root fills the root directory, which is there already, with lost+found in it.
func (t *treeWriter) root(n *Node) error {
	i, blocks, err := t.readDir(rootInode)
	if err != nil {
		return err
	}
	if n.Mode != 0 {
		if err := t.describe(i, n); err != nil {
			return err
		}
	}
	children := n.Children
	if children[lostFound] == nil {
		children = maps.Clone(children)
		if children == nil {
			children = map[string]*Node{}
		}
		made := &inode{number: t.nextInode - 1, mode: unix.S_IFDIR}
		children[lostFound] = &Node{Mode: unix.S_IFDIR, inode: made}
	} else if !children[lostFound].IsDir() {
		return errors.New("/" + lostFound + " has to be a directory in ext4")
	}
	return t.directory(i, children, rootInode, blocks)
}

// lostFound fills lost+found with what the tree has of it.
func (t *treeWriter) lostFound(n *Node) (*inode, error) {
	i, blocks, err := t.readDir(binary.LittleEndian.Uint32(t.super[0x54:]))
	if err != nil {
		return nil, err
	}
	if err := t.describe(i, n); err != nil {
		return nil, err
	}
	return i, t.directory(i, n.Children, rootInode, blocks)
}

// directory makes all that is in a directory, and writes it to the blocks that it has first.
func (t *treeWriter) directory(i *inode, children map[string]*Node, parent uint32, has []run) error {
	dir := kindOf(unix.S_IFDIR)
	entries := make([]entry, 0, len(children)+2)
	entries = append(entries, entry{i.number, dir, "."}, entry{parent, dir, ".."})
	for _, name := range slices.Sorted(maps.Keys(children)) {
		if err := t.ctx.Err(); err != nil {
			return context.Cause(t.ctx)
		}
		if name == "" || len(name) > maxName || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
			return fmt.Errorf("%.300q is no name of a file", name)
		}
		made, err := t.make(children[name], i.number, name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		entries = append(entries, entry{made.number, kindOf(uint32(made.mode)), name})
	}
	i.links = 2
	for _, e := range entries[2:] {
		if e.kind == dir {
			i.links++
		}
	}
	return t.writeDir(i, entries, has)
}

// make makes a file, with all that is in it.
func (t *treeWriter) make(n *Node, parent uint32, name string) (*inode, error) {
	if n.inode != nil {
		if n.IsDir() && (parent != rootInode || name != lostFound) {
			return nil, errors.New("a directory has two names")
		}
		n.inode.links++
		return n.inode, nil
	}
	if parent == rootInode && name == lostFound {
		i, err := t.lostFound(n)
		n.inode = i
		return i, err
	}
	number, err := t.newInode(n.IsDir())
	if err != nil {
		return nil, err
	}
	i := &inode{number: number, links: 1}
	n.inode = i
	if err := t.describe(i, n); err != nil {
		return nil, err
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return i, t.directory(i, n.Children, parent, nil)
	case unix.S_IFREG:
		i.size = n.Data.size
		err = t.setExtents(i, n.Data.extents)
	case unix.S_IFLNK:
		err = t.link(i, n.Link)
	case unix.S_IFCHR, unix.S_IFBLK:
		setDevice(i, n.Device)
	}
	t.files = append(t.files, i)
	return i, err
}

// describe gives an inode what its file has beside its content.
func (t *treeWriter) describe(i *inode, n *Node) error {
	i.mode, i.uid, i.gid, i.modified = uint16(n.Mode), n.UID, n.GID, clamp(n.ModTime)
	return t.setXattrs(i, n.Xattrs)
}

// clamp returns the time of those that ext4 has that is the nearest.
func clamp(at time.Time) time.Time {
	const first, last = -1 << 31, 1<<34 - 1<<31 - 1
	if seconds := at.Unix(); seconds < first || seconds > last {
		return time.Unix(min(max(seconds, first), last), 0)
	}
	return at
}

// readDir reads the inode of a directory that mke2fs has made, and where it is.
func (fs *fileSystem) readDir(number uint32) (*inode, []run, error) {
	le := binary.LittleEndian
	b := make([]byte, inodeSize)
	if _, err := fs.file.ReadAt(b, fs.inodeAt(number)); err != nil {
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

// writeDir writes a directory, to the blocks that it has first.
func (fs *fileSystem) writeDir(i *inode, entries []entry, has []run) error {
	if i.links >= maxLinks {
		i.links = 1
	}
	had := uint64(0)
	for _, r := range has {
		had += r.count
	}
	content := fs.dirBlocks(i.number, entries, int(had))
	i.size = uint64(len(content))
	more, err := fs.allocate(i.size/blockSize - had)
	if err != nil {
		return err
	}
	extents := extentsOf(append(slices.Clone(has), more...), 0)
	for _, e := range extents {
		if _, err := fs.file.WriteAt(content[e.at*blockSize:][:e.count*blockSize], int64(e.first)*blockSize); err != nil {
			return err
		}
	}
	if err := fs.setExtents(i, extents); err != nil {
		return err
	}
	return fs.writeInode(i)
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

// link writes a symbolic link.
func (fs *fileSystem) link(i *inode, target string) error {
	i.size = uint64(len(target))
	if target == "" || len(target) >= blockSize || strings.Contains(target, "\x00") {
		return errors.New("no symbolic link can lead there") // no kernel makes such a link
	}
	if len(target) < len(i.content) {
		copy(i.content[:], target)
		return nil
	}
	block := make([]byte, blockSize)
	copy(block, target)
	runs, err := fs.allocate(1)
	if err != nil {
		return err
	}
	if _, err := fs.file.WriteAt(block, int64(runs[0].first)*blockSize); err != nil {
		return err
	}
	return fs.setExtents(i, extentsOf(runs, 0))
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
