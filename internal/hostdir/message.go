package hostdir

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// The numbers of this file are those of the kernel's include/uapi/linux/fuse.h.

// opcode is what a request asks for.
type opcode uint32

const (
	opLookup        opcode = 1
	opForget        opcode = 2
	opGetattr       opcode = 3
	opSetattr       opcode = 4
	opReadlink      opcode = 5
	opSymlink       opcode = 6
	opMknod         opcode = 8
	opMkdir         opcode = 9
	opUnlink        opcode = 10
	opRmdir         opcode = 11
	opRename        opcode = 12
	opLink          opcode = 13
	opOpen          opcode = 14
	opRead          opcode = 15
	opWrite         opcode = 16
	opStatfs        opcode = 17
	opRelease       opcode = 18
	opFsync         opcode = 20
	opSetxattr      opcode = 21
	opGetxattr      opcode = 22
	opListxattr     opcode = 23
	opRemovexattr   opcode = 24
	opInit          opcode = 26
	opOpendir       opcode = 27
	opReaddir       opcode = 28
	opReleasedir    opcode = 29
	opFsyncdir      opcode = 30
	opCreate        opcode = 35
	opInterrupt     opcode = 36
	opDestroy       opcode = 38
	opBatchForget   opcode = 42
	opFallocate     opcode = 43
	opReaddirplus   opcode = 44
	opRename2       opcode = 45
	opLseek         opcode = 46
	opCopyFileRange opcode = 47
)

// The version of the protocol that is spoken. The kernel speaks any that is older than its own.
const (
	protocolMajor = 7
	protocolMinor = 31
)

// The abilities of INIT that are asked for.
const (
	initAsyncRead       = 1 << 0
	initAtomicTruncate  = 1 << 3
	initBigWrites       = 1 << 5
	initAutoInvalidate  = 1 << 12
	initReaddirplus     = 1 << 13
	initReaddirplusAuto = 1 << 14
	initParallelDirOps  = 1 << 18
	initMaxPages        = 1 << 22
	initKillPrivileges  = 1 << 28

	wantedAbilities = initAsyncRead | initAtomicTruncate | initBigWrites | initAutoInvalidate | initReaddirplus |
		initReaddirplusAuto | initParallelDirOps | initMaxPages | initKillPrivileges
)

// Flags of answers and requests.
const (
	openKeepCache = 1 << 1 // FOPEN_KEEP_CACHE
	getattrHandle = 1 << 0 // FUSE_GETATTR_FH
	fsyncData     = 1 << 0 // FUSE_FSYNC_FDATASYNC

	setMode     = 1 << 0
	setSize     = 1 << 3
	setAtime    = 1 << 4
	setMtime    = 1 << 5
	setHandle   = 1 << 6
	setAtimeNow = 1 << 7
	setMtimeNow = 1 << 8

	notifyInode = 2 // FUSE_NOTIFY_INVAL_INODE
	notifyEntry = 3 // FUSE_NOTIFY_INVAL_ENTRY
)

const (
	requestHeader = 40
	answerHeader  = 16
	entrySize     = 128 // of struct fuse_entry_out
	attrSize      = 88  // of struct fuse_attr

	pageSize = 4096
	// maxIO bounds what one request reads or writes, in bytes.
	maxIO = 1 << 20
	// maxRequest bounds a request, in bytes: a write with its header, or any other with two
	// names or an extended attribute.
	maxRequest = maxIO + pageSize
	maxName    = 255
	maxTarget  = 4095     // of a symbolic link, in bytes
	maxXattr   = 64 << 10 // XATTR_SIZE_MAX
)

// request is what the guest's kernel asks for. It is not trusted.
type request struct {
	op     opcode
	unique uint64
	node   uint64
	body   fields
	cost   int64 // the memory that is accounted for it
}

// fields reads the fields of a message, one after the other. What is not there reads as zero
// and is noted in short.
type fields struct {
	rest  []byte
	short bool
}

func (f *fields) take(n int) []byte {
	if n < 0 || n > len(f.rest) {
		f.short = true
		f.rest = nil
		return nil
	}
	taken := f.rest[:n]
	f.rest = f.rest[n:]
	return taken
}

func (f *fields) u32() uint32 {
	if b := f.take(4); b != nil {
		return binary.NativeEndian.Uint32(b)
	}
	return 0
}

func (f *fields) u64() uint64 {
	if b := f.take(8); b != nil {
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}

func (f *fields) skip(n int) { f.take(n) }

// text reads a text that ends with a zero byte.
func (f *fields) text() string {
	end := bytes.IndexByte(f.rest, 0)
	if end < 0 {
		f.short = true
		f.rest = nil
		return ""
	}
	text := string(f.rest[:end])
	f.rest = f.rest[end+1:]
	return text
}

// name reads the name of a directory entry. The error says that it is none: it names no other
// directory than the one that it is looked up in.
func (f *fields) name() (string, error) {
	name := f.text()
	switch {
	case f.short || name == "" || name == "." || name == ".." || bytes.IndexByte([]byte(name), '/') >= 0:
		return "", unix.EINVAL
	case len(name) > maxName:
		return "", unix.ENAMETOOLONG
	}
	return name, nil
}

// err returns an error if a field was read that is not there.
func (f *fields) err() error {
	if f.short {
		return unix.EINVAL
	}
	return nil
}

// answer is the body of an answer. It begins with room for the header.
type answer struct{ bytes []byte }

func newAnswer(size int) *answer {
	return &answer{bytes: make([]byte, answerHeader, answerHeader+size)}
}

func (a *answer) u16(v uint16) { a.bytes = binary.NativeEndian.AppendUint16(a.bytes, v) }
func (a *answer) u32(v uint32) { a.bytes = binary.NativeEndian.AppendUint32(a.bytes, v) }
func (a *answer) u64(v uint64) { a.bytes = binary.NativeEndian.AppendUint64(a.bytes, v) }
func (a *answer) raw(b []byte) { a.bytes = append(a.bytes, b...) }
func (a *answer) zero(n int)   { a.bytes = append(a.bytes, make([]byte, n)...) }
func (a *answer) size() int    { return len(a.bytes) - answerHeader }

// seal fills in the header. Code is an errno, as a negative number, or what a notification
// tells.
func (a *answer) seal(unique uint64, code int32) []byte {
	binary.NativeEndian.PutUint32(a.bytes, uint32(len(a.bytes)))
	binary.NativeEndian.PutUint32(a.bytes[4:], uint32(code))
	binary.NativeEndian.PutUint64(a.bytes[8:], unique)
	return a.bytes
}
