package ext4fs

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	xattrMagic  = 0xea020000
	xattrHeader = 32 // of a block of attributes
	xattrEntry  = 16 // of an entry, without its name
	inodeRoom   = inodeSize - 0x80 - extraSize
)

// xattr is an extended attribute as ext4 has it: the first part of its name is a number.
type xattr struct {
	index byte
	name  string
	value []byte
}

// prefixes returns the first parts of names, by their numbers.
func prefixes() map[string]byte {
	return map[string]byte{
		"user.": 1, "system.posix_acl_access": 2, "system.posix_acl_default": 3, "trusted.": 4, "security.": 6,
	}
}

// setXattrs gives an inode attributes, by their whole names.
func (fs *fileSystem) setXattrs(i *inode, named map[string][]byte) error {
	attributes, err := split(named)
	if err != nil || len(attributes) == 0 {
		return err
	}
	size := 4 // what ends the list
	for _, a := range attributes {
		size += entrySize(a) + round4(len(a.value))
	}
	if 4+size <= inodeRoom {
		i.xattrs = binary.LittleEndian.AppendUint32(nil, xattrMagic)
		i.xattrs = append(i.xattrs, layOut(attributes, 0, inodeRoom-4)...)
		return nil
	}
	if xattrHeader+size > blockSize {
		return errXattrs
	}
	runs, err := fs.allocate(1)
	if err != nil {
		return err
	}
	i.xattrAt = runs[0].first
	i.blocks++
	_, err = fs.file.WriteAt(fs.xattrBlock(i.xattrAt, attributes), int64(i.xattrAt)*blockSize)
	return err
}

// errXattrs reports that a file's attributes take more than a block.
var errXattrs = errors.New("its extended attributes are too large")

// split returns attributes as ext4 has them, in its order, without those that it has no number
// for.
func split(named map[string][]byte) ([]xattr, error) {
	var attributes []xattr
	for name, value := range named {
		for prefix, index := range prefixes() {
			inner, ok := strings.CutPrefix(name, prefix)
			isACL := strings.HasPrefix(prefix, "system.")
			if !ok || isACL != (inner == "") {
				continue
			}
			if len(inner) > maxName || len(value) > blockSize {
				return nil, errXattrs
			}
			if isACL {
				value = packACL(value)
			}
			attributes = append(attributes, xattr{index, inner, value})
		}
	}
	slices.SortFunc(attributes, byKey)
	return attributes, nil
}

func readXattrs(host string) (map[string][]byte, error) {
	size, err := unix.Llistxattr(host, nil)
	if errors.Is(err, unix.ENOTSUP) || size == 0 {
		return nil, nil
	}
	names := make([]byte, max(size, 0))
	if err == nil {
		size, err = unix.Llistxattr(host, names)
	}
	if err != nil {
		return nil, err
	}
	attributes := map[string][]byte{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:size]), "\x00"), "\x00") {
		for prefix := range prefixes() {
			if !strings.HasPrefix(name, prefix) {
				continue
			}
			if attributes[name], err = readXattr(host, name); err != nil {
				return nil, err
			}
		}
	}
	return attributes, nil
}

func readXattr(host, name string) ([]byte, error) {
	size, err := unix.Lgetxattr(host, name, nil)
	if err != nil || size == 0 {
		return nil, err
	}
	value := make([]byte, size)
	size, err = unix.Lgetxattr(host, name, value)
	return value[:max(size, 0)], err
}

// packACL makes an access control list as the kernel shows it one as ext4 keeps it: only
// entries of named users and groups have an id.
func packACL(shown []byte) []byte {
	const header, shownEntry, user, group = 4, 8, 0x02, 0x08
	le := binary.LittleEndian
	packed := le.AppendUint32(nil, 1)
	for rest := shown[min(len(shown), header):]; len(rest) >= shownEntry; rest = rest[shownEntry:] {
		packed = append(packed, rest[:4]...)
		if tag := le.Uint16(rest); tag == user || tag == group {
			packed = append(packed, rest[4:shownEntry]...)
		}
	}
	return packed
}

func round4(n int) int { return (n + 3) &^ 3 }

func entrySize(a xattr) int { return xattrEntry + round4(len(a.name)) }

// layOut puts the entries at the beginning of some room and the values at its end.
// Offsets are from before bytes ahead of it.
func layOut(attributes []xattr, before, room int) []byte {
	le := binary.LittleEndian
	b := make([]byte, room)
	at, end := 0, room
	for _, a := range attributes {
		end -= round4(len(a.value))
		b[at], b[at+1] = byte(len(a.name)), a.index
		if len(a.value) > 0 {
			le.PutUint16(b[at+2:], uint16(before+end))
		}
		le.PutUint32(b[at+8:], uint32(len(a.value)))
		copy(b[at+xattrEntry:], a.name)
		copy(b[end:], a.value)
		le.PutUint32(b[at+12:], hashXattr(a))
		at += entrySize(a)
	}
	return b
}

// hashXattr returns the hash of an attribute, as in the kernel's fs/ext4/xattr.c.
func hashXattr(a xattr) uint32 {
	var hash uint32
	for _, c := range []byte(a.name) {
		hash = hash<<5 ^ hash>>27 ^ uint32(c)
	}
	padded := append(slices.Clone(a.value), make([]byte, round4(len(a.value))-len(a.value))...)
	for word := range slices.Chunk(padded, 4) {
		hash = hash<<16 ^ hash>>16 ^ binary.LittleEndian.Uint32(word)
	}
	return hash
}

// xattrBlock returns a block of attributes.
func (fs *fileSystem) xattrBlock(at uint64, attributes []xattr) []byte {
	le := binary.LittleEndian
	block := le.AppendUint32(nil, xattrMagic)
	block = le.AppendUint32(block, 1) // it belongs to one file
	block = le.AppendUint32(block, 1) // and is one block
	block = append(block, make([]byte, xattrHeader-len(block))...)
	block = append(block, layOut(attributes, xattrHeader, blockSize-xattrHeader)...)
	var hash uint32
	for _, a := range attributes {
		hash = hash<<16 ^ hash>>16 ^ hashXattr(a)
	}
	le.PutUint32(block[12:], hash)
	sum := checksum(checksum(fs.seed, le.AppendUint64(nil, at)), block)
	le.PutUint32(block[16:], sum)
	return block
}

// byKey orders attributes as ext4 wants them in a block.
func byKey(a, b xattr) int {
	return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
}
