// Package ext4fs fills an empty ext4 file system, as mke2fs makes it, with a tree of files: one
// of the host, or one that its caller has in memory and whose content comes as a stream. The
// latter may be anybody's, as nothing of it becomes a file of the host.
//
// mke2fs can do that itself, but it looks through all of a directory, three times, for
// each file that it adds to it, and knows no owners but the host's.
//
// Offsets are those of the kernel's Documentation/filesystems/ext4.
package ext4fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
)

const (
	blockSize = 4096
	inodeSize = 256
	descSize  = 64
	// superAt is where the superblock is, in bytes, and superSize how long.
	superAt   = 1024
	superSize = 1024
	magic     = 0xef53
	// rootInode is the inode of the root directory.
	rootInode = 2
)

// Features that change where things are, and that this package knows.
const (
	compatResizeInode = 0x10
	incompatKnown     = 0x2 | 0x40 | 0x80 | 0x200 // filetype, extents, 64bit, flex_bg
	roCompatKnown     = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | roCompatChecksums
	roCompatChecksums = 0x400
	roCompatSparse    = 0x1
)

// Flags of a group.
const (
	inodesUninit = 1 // its bitmap of inodes was never written: all are free
	blocksUninit = 2 // its bitmap of blocks was never written: all but metadata are free
)

// The errors of [Fill].
var (
	// ErrNoSpace reports that the tree needs more blocks than there are.
	ErrNoSpace = errors.New("the file system is too small for the tree")
	// ErrNoInodes reports that the tree has more files than there are inodes.
	ErrNoInodes = errors.New("the tree has too many files for the file system")
)

// fileSystem is a file system that is being filled.
type fileSystem struct {
	file  *os.File
	super []byte
	seed  uint32 // of all checksums

	blocks, blocksPerGroup uint64
	inodesPerGroup         uint32
	groups                 []*group
	nextBlock              uint64
	nextInode              uint32 // counted from 1
	freed                  bool   // blocks before nextBlock are free again
}

// group is a group of blocks and inodes, with its bitmaps.
type group struct {
	desc           []byte
	blocks, inodes []byte
	usedBlocks     uint32 // those that were taken here, not by mke2fs
	usedInodes     uint32
	usedDirs       uint32
	lastInode      uint32 // one more than the index of the last inode in use
	changed        bool
}

// open reads the metadata of an empty file system.
func open(file *os.File) (*fileSystem, error) {
	fs := &fileSystem{file: file, super: make([]byte, superSize)}
	if _, err := file.ReadAt(fs.super, superAt); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	le := binary.LittleEndian
	switch {
	case le.Uint16(fs.super[0x38:]) != magic:
		return nil, errors.New("there is no ext4 file system")
	case le.Uint32(fs.super[0x18:]) != 2, le.Uint16(fs.super[0x58:]) != inodeSize, le.Uint16(fs.super[0xfe:]) != descSize,
		le.Uint32(fs.super[0x60:])&^uint32(incompatKnown) != 0, le.Uint32(fs.super[0x64:])&^uint32(roCompatKnown) != 0,
		le.Uint32(fs.super[0x64:])&roCompatChecksums == 0:
		return nil, errors.New("the file system has other features than expected")
	}
	fs.seed = checksum(^uint32(0), fs.super[0x68:0x78]) // its UUID
	fs.blocks = uint64(le.Uint32(fs.super[0x04:])) | uint64(le.Uint32(fs.super[0x150:]))<<32
	fs.blocksPerGroup = uint64(le.Uint32(fs.super[0x20:]))
	fs.inodesPerGroup = le.Uint32(fs.super[0x28:])
	if fs.blocksPerGroup != blockSize*8 || fs.inodesPerGroup == 0 || fs.inodesPerGroup > blockSize*8 || fs.inodesPerGroup%8 != 0 {
		return nil, errors.New("the groups of the file system have an unexpected size")
	}
	fs.nextInode = le.Uint32(fs.super[0x54:]) + 1 // behind lost+found
	return fs, fs.readGroups()
}

func (fs *fileSystem) readGroups() error {
	count := (fs.blocks + fs.blocksPerGroup - 1) / fs.blocksPerGroup
	descs := make([]byte, count*descSize)
	if _, err := fs.file.ReadAt(descs, blockSize); err != nil {
		return fmt.Errorf("read groups: %w", err)
	}
	for i := range count {
		fs.groups = append(fs.groups, &group{desc: descs[i*descSize:][:descSize]})
	}
	for i, g := range fs.groups {
		flags := binary.LittleEndian.Uint16(g.desc[0x12:])
		g.blocks, g.inodes = make([]byte, blockSize), make([]byte, blockSize)
		if flags&blocksUninit != 0 {
			fs.markMetadata(uint64(i), g.blocks)
		} else if _, err := fs.file.ReadAt(g.blocks, int64(address(g.desc, 0x00))*blockSize); err != nil {
			return fmt.Errorf("read bitmap: %w", err)
		}
		if flags&inodesUninit != 0 {
			for j := fs.inodesPerGroup / 8; j < blockSize; j++ {
				g.inodes[j] = 0xff // there are no such inodes
			}
		} else if _, err := fs.file.ReadAt(g.inodes, int64(address(g.desc, 0x04))*blockSize); err != nil {
			return fmt.Errorf("read bitmap: %w", err)
		}
		g.lastInode = fs.inodesPerGroup - count16(g.desc, 0x1c, 0x32)
	}
	return nil
}

// address reads an address in a group's description: of a bitmap, or the table of inodes.
func address(desc []byte, at int) uint64 {
	return uint64(binary.LittleEndian.Uint32(desc[at:])) | uint64(binary.LittleEndian.Uint32(desc[at+0x20:]))<<32
}

func count16(desc []byte, low, high int) uint32 {
	return uint32(binary.LittleEndian.Uint16(desc[low:])) | uint32(binary.LittleEndian.Uint16(desc[high:]))<<16
}

func setCount16(desc []byte, low, high int, n uint32) {
	binary.LittleEndian.PutUint16(desc[low:], uint16(n))
	binary.LittleEndian.PutUint16(desc[high:], uint16(n>>16))
}

// markMetadata marks the blocks of a group that hold metadata, or are beyond the end.
func (fs *fileSystem) markMetadata(index uint64, bitmap []byte) {
	first := index * fs.blocksPerGroup
	mark := func(from, count uint64) {
		for block := max(from, first); block < min(from+count, first+fs.blocksPerGroup); block++ {
			bitmap[(block-first)/8] |= 1 << ((block - first) % 8)
		}
	}
	if fs.hasSuper(index) {
		tables := (uint64(len(fs.groups))*descSize + blockSize - 1) / blockSize
		mark(first, 1+tables+uint64(binary.LittleEndian.Uint16(fs.super[0xce:])))
	}
	for _, g := range fs.groups {
		mark(address(g.desc, 0x00), 1)
		mark(address(g.desc, 0x04), 1)
		mark(address(g.desc, 0x08), uint64(fs.inodesPerGroup)*inodeSize/blockSize)
	}
	mark(fs.blocks, fs.blocksPerGroup)
}

// hasSuper reports whether a group has a copy of the superblock: 0, 1 and the powers of 3,
// 5 and 7 do.
func (fs *fileSystem) hasSuper(index uint64) bool {
	if index <= 1 || binary.LittleEndian.Uint32(fs.super[0x64:])&roCompatSparse == 0 {
		return true
	}
	for _, base := range []uint64{3, 5, 7} {
		power := base
		for power < index {
			power *= base
		}
		if power == index {
			return true
		}
	}
	return false
}

// run is a number of blocks that follow each other.
type run struct{ first, count uint64 }

// maxRun is how many blocks an extent may have.
const maxRun = 32768

// allocate takes free blocks, in as few runs as there are.
func (fs *fileSystem) allocate(count uint64) ([]run, error) {
	var runs []run
	for count > 0 {
		if fs.nextBlock >= fs.blocks {
			if !fs.freed {
				return nil, ErrNoSpace
			}
			fs.nextBlock, fs.freed = 0, false
		}
		block := fs.nextBlock
		fs.nextBlock++
		g, bit := fs.groups[block/fs.blocksPerGroup], block%fs.blocksPerGroup
		if g.blocks[bit/8]&(1<<(bit%8)) != 0 {
			continue
		}
		g.blocks[bit/8] |= 1 << (bit % 8)
		g.usedBlocks++
		g.changed = true
		count--
		if n := len(runs); n > 0 && runs[n-1].first+runs[n-1].count == block && runs[n-1].count < maxRun {
			runs[n-1].count++
		} else {
			runs = append(runs, run{block, 1})
		}
	}
	return runs, nil
}

// free gives blocks up again that were taken.
func (fs *fileSystem) free(r run) {
	for block := r.first; block < r.first+r.count; block++ {
		g, bit := fs.groups[block/fs.blocksPerGroup], block%fs.blocksPerGroup
		g.blocks[bit/8] &^= 1 << (bit % 8)
		g.usedBlocks--
	}
	fs.freed = true
}

// newInode takes a free inode.
func (fs *fileSystem) newInode(dir bool) (uint32, error) {
	for {
		number := fs.nextInode
		index := int((number - 1) / fs.inodesPerGroup)
		if index >= len(fs.groups) {
			return 0, ErrNoInodes
		}
		fs.nextInode++
		g, bit := fs.groups[index], (number-1)%fs.inodesPerGroup
		if g.inodes[bit/8]&(1<<(bit%8)) != 0 {
			continue
		}
		g.inodes[bit/8] |= 1 << (bit % 8)
		g.usedInodes++
		if dir {
			g.usedDirs++
		}
		g.lastInode = max(g.lastInode, bit+1)
		g.changed = true
		return number, nil
	}
}

// inodeAt returns where an inode is, in bytes.
func (fs *fileSystem) inodeAt(number uint32) int64 {
	table := address(fs.groups[(number-1)/fs.inodesPerGroup].desc, 0x08)
	return int64(table)*blockSize + int64((number-1)%fs.inodesPerGroup)*inodeSize
}

// close writes the bitmaps and the counts.
func (fs *fileSystem) close() error {
	le := binary.LittleEndian
	var blocks, inodes uint32
	for i, g := range fs.groups {
		blocks, inodes = blocks+g.usedBlocks, inodes+g.usedInodes
		if g.changed {
			if err := fs.writeGroup(uint32(i), g); err != nil {
				return err
			}
		}
	}
	free := uint64(le.Uint32(fs.super[0x0c:])) | uint64(le.Uint32(fs.super[0x158:]))<<32
	free -= uint64(blocks)
	le.PutUint32(fs.super[0x0c:], uint32(free))
	le.PutUint32(fs.super[0x158:], uint32(free>>32))
	le.PutUint32(fs.super[0x10:], le.Uint32(fs.super[0x10:])-inodes)
	le.PutUint32(fs.super[0x3fc:], checksum(^uint32(0), fs.super[:0x3fc]))
	_, err := fs.file.WriteAt(fs.super, superAt)
	return err
}

func (fs *fileSystem) writeGroup(index uint32, g *group) error {
	le := binary.LittleEndian
	setCount16(g.desc, 0x0c, 0x2c, count16(g.desc, 0x0c, 0x2c)-g.usedBlocks)
	setCount16(g.desc, 0x0e, 0x2e, count16(g.desc, 0x0e, 0x2e)-g.usedInodes)
	setCount16(g.desc, 0x10, 0x30, count16(g.desc, 0x10, 0x30)+g.usedDirs)
	setCount16(g.desc, 0x1c, 0x32, fs.inodesPerGroup-g.lastInode)
	flags := le.Uint16(g.desc[0x12:])
	if g.usedBlocks > 0 {
		flags &^= blocksUninit
	}
	if g.usedInodes > 0 {
		flags &^= inodesUninit
	}
	le.PutUint16(g.desc[0x12:], flags)
	if flags&blocksUninit == 0 {
		setCount16(g.desc, 0x18, 0x38, checksum(fs.seed, g.blocks))
		if _, err := fs.file.WriteAt(g.blocks, int64(address(g.desc, 0x00))*blockSize); err != nil {
			return err
		}
	}
	if flags&inodesUninit == 0 {
		setCount16(g.desc, 0x1a, 0x3a, checksum(fs.seed, g.inodes[:fs.inodesPerGroup/8]))
		if _, err := fs.file.WriteAt(g.inodes, int64(address(g.desc, 0x04))*blockSize); err != nil {
			return err
		}
	}
	le.PutUint16(g.desc[0x1e:], 0)
	sum := checksum(checksum(fs.seed, le.AppendUint32(nil, index)), g.desc)
	le.PutUint16(g.desc[0x1e:], uint16(sum))
	_, err := fs.file.WriteAt(g.desc, blockSize+int64(index)*descSize)
	return err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum goes on from a checksum as ext4 has it: CRC-32C, not inverted at either end.
func checksum(sum uint32, data []byte) uint32 { return ^crc32.Update(^sum, castagnoli, data) }
