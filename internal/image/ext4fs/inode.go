package ext4fs

import (
	"encoding/binary"
	"time"
)

const (
	flagExtents  = 0x80000
	extraSize    = 32 // how much of an inode's second half has a meaning
	extentsMagic = 0xf30a
	recordSize   = 12 // of an extent, and of what leads to a block of them
	// inodeRecords and blockRecords are how many of them there is room for.
	inodeRecords = 4
	blockRecords = (blockSize - recordSize - 4) / recordSize
	// tailSize is the size of what ends a block of a directory, with its checksum.
	tailSize = 12
	// maxLinks is how many links to a directory are counted; more are given as one.
	maxLinks = 65000
)

// inode is a file's inode.
type inode struct {
	number   uint32
	mode     uint16
	uid, gid uint32
	links    uint32
	size     uint64
	blocks   uint64 // of the file system, metadata too
	flags    uint32
	content  [60]byte // extents, a short link, or a device
	modified time.Time
	xattrs   []byte // within the inode
	xattrAt  uint64 // the block of attributes that don't fit
}

// seedOf returns what checksums of an inode's metadata go on from.
func (fs *fileSystem) seedOf(number uint32) uint32 {
	le := binary.LittleEndian
	return checksum(checksum(fs.seed, le.AppendUint32(nil, number)), make([]byte, 4)) // its generation is 0
}

func (fs *fileSystem) writeInode(i *inode) error {
	le := binary.LittleEndian
	b := make([]byte, inodeSize)
	le.PutUint16(b[0x00:], i.mode)
	le.PutUint16(b[0x02:], uint16(i.uid))
	le.PutUint32(b[0x04:], uint32(i.size))
	seconds := uint64(i.modified.Unix())
	extra := uint32(seconds>>32+seconds>>31&1)&3 | uint32(i.modified.Nanosecond())<<2
	// But for the time of the last change of state (0x0c and 0x84), which stays the first one,
	// 1970: any change in a guest makes it another, so that what it has changed can be found.
	for _, at := range []int{0x08, 0x10, 0x90} {
		le.PutUint32(b[at:], uint32(seconds))
	}
	for _, at := range []int{0x88, 0x8c, 0x94} {
		le.PutUint32(b[at:], extra)
	}
	le.PutUint16(b[0x18:], uint16(i.gid))
	le.PutUint16(b[0x1a:], uint16(i.links))
	sectors := i.blocks * (blockSize / 512)
	le.PutUint32(b[0x1c:], uint32(sectors))
	le.PutUint16(b[0x74:], uint16(sectors>>32))
	le.PutUint32(b[0x20:], i.flags)
	copy(b[0x28:], i.content[:])
	le.PutUint32(b[0x68:], uint32(i.xattrAt))
	le.PutUint16(b[0x76:], uint16(i.xattrAt>>32))
	le.PutUint32(b[0x6c:], uint32(i.size>>32))
	le.PutUint16(b[0x78:], uint16(i.uid>>16))
	le.PutUint16(b[0x7a:], uint16(i.gid>>16))
	le.PutUint16(b[0x80:], extraSize)
	copy(b[0x80+extraSize:], i.xattrs)
	sum := checksum(fs.seedOf(i.number), b)
	le.PutUint16(b[0x7c:], uint16(sum))
	le.PutUint16(b[0x82:], uint16(sum>>16))
	_, err := fs.file.WriteAt(b, fs.inodeAt(i.number))
	return err
}

// extent is where a part of a file is.
type extent struct {
	at uint64 // in blocks of the file
	run
}

// setExtents has an inode point to its blocks.
func (fs *fileSystem) setExtents(i *inode, extents []extent) error {
	le := binary.LittleEndian
	var records [][]byte
	for _, e := range extents {
		i.blocks += e.count
		record := le.AppendUint32(nil, uint32(e.at))
		record = le.AppendUint16(record, uint16(e.count))
		record = le.AppendUint16(record, uint16(e.first>>32))
		records = append(records, le.AppendUint32(record, uint32(e.first)))
	}
	depth := uint16(0)
	for ; len(records) > inodeRecords; depth++ {
		var above [][]byte
		for len(records) > 0 {
			some := records[:min(len(records), blockRecords)]
			records = records[len(some):]
			at, err := fs.writeExtentBlock(i.number, some, depth)
			if err != nil {
				return err
			}
			i.blocks++
			record := append([]byte(nil), some[0][:4]...) // the first block of the file in it
			record = le.AppendUint32(record, uint32(at))
			above = append(above, le.AppendUint32(record, uint32(at>>32)))
		}
		records = above
	}
	i.flags |= flagExtents
	copy(i.content[:], extentNode(records, inodeRecords, depth))
	return nil
}

// extentNode returns a header with records.
func extentNode(records [][]byte, room, depth uint16) []byte {
	le := binary.LittleEndian
	node := le.AppendUint16(nil, extentsMagic)
	node = le.AppendUint16(node, uint16(len(records)))
	node = le.AppendUint16(node, room)
	node = le.AppendUint16(node, depth)
	node = le.AppendUint32(node, 0)
	for _, record := range records {
		node = append(node, record...)
	}
	return node
}

func (fs *fileSystem) writeExtentBlock(number uint32, records [][]byte, depth uint16) (uint64, error) {
	runs, err := fs.allocate(1)
	if err != nil {
		return 0, err
	}
	block := make([]byte, blockSize)
	copy(block, extentNode(records, blockRecords, depth))
	const tail = recordSize + blockRecords*recordSize
	binary.LittleEndian.PutUint32(block[tail:], checksum(fs.seedOf(number), block[:tail]))
	_, err = fs.file.WriteAt(block, int64(runs[0].first)*blockSize)
	return runs[0].first, err
}

// entry is a name in a directory.
type entry struct {
	number uint32
	kind   byte // see kindOf
	name   string
}

// dirBlocks lays entries out in the blocks of a directory, at least as many as given.
func (fs *fileSystem) dirBlocks(number uint32, entries []entry, atLeast int) []byte {
	le := binary.LittleEndian
	const room = blockSize - tailSize
	var blocks []byte
	block := make([]byte, 0, blockSize)
	last := 0 // where the last entry of the block begins
	finish := func() {
		if len(block) == 0 {
			block = append(block, make([]byte, 8)...) // nothing
			last = 0
		}
		le.PutUint16(block[last+4:], uint16(room-last))
		block = append(block, make([]byte, room-len(block))...)
		block = append(block, 0, 0, 0, 0, tailSize, 0, 0, 0xde)
		block = le.AppendUint32(block, checksum(fs.seedOf(number), block[:room]))
		blocks = append(blocks, block...)
		block = block[:0]
	}
	for _, e := range entries {
		size := (8 + len(e.name) + 3) &^ 3
		if len(block)+size > room {
			finish()
		}
		last = len(block)
		block = le.AppendUint32(block, e.number)
		block = le.AppendUint16(block, uint16(size))
		block = append(block, byte(len(e.name)), e.kind)
		block = append(block, e.name...)
		block = append(block, make([]byte, size-8-len(e.name))...)
	}
	finish()
	for len(blocks) < atLeast*blockSize {
		finish()
	}
	return blocks
}
