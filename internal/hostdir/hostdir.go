// Package hostdir serves a directory of the host to the kernel of a guest, by the FUSE protocol.
//
// The guest's agent passes the messages of its kernel's FUSE on as they are (package fuserelay),
// so what comes here is what a hostile guest makes up: every number, name and length of it is
// checked. The guest names files by numbers that it was given, and by names of single directory
// entries. A file is opened from the directory down each time (openat2 with RESOLVE_BENEATH and
// RESOLVE_NO_SYMLINKS) and is only used if it is the one that the number was given for. So
// neither a link, nor "..", nor a directory that is renamed meanwhile leads out of the directory,
// and what has left it can't be reached any more. Links are text, and the guest's to follow.
//
// Everything appears to be owned by one user of the guest. What is made on the host is owned by
// the user who runs this process, without set-id bits, and is never a device; files that are
// neither regular nor directories are never opened.
//
// No data and no attributes of files are kept here: what the host does to a file is what the
// guest sees when it opens the file next.
package hostdir

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/diskspace"
)

// Options of a [Dir]. The zero value serves it for reading and writing.
type Options struct {
	// ReadOnly refuses all that would change the directory.
	ReadOnly bool
	// NoXattr leaves out extended attributes, which spares the guest questions after them.
	NoXattr bool
	// Log is told of what ends the serving. Nil: nobody is.
	Log *slog.Logger
}

const (
	// maxInFlight bounds how many requests of a guest are worked on at once, and maxMemory the
	// bytes that they take, in requests and answers.
	maxInFlight = 64
	maxMemory   = 16 << 20
)

// Dir is a directory of the host that a guest has as one of its own.
type Dir struct {
	opts Options
	root int // a descriptor of the directory
	file fileID
	// uid and gid are the user and group of the guest that everything is owned by.
	uid, gid uint32

	room    diskspace.Room
	watcher watcher
	nodes   table
	handles handles
	memory  *semaphore.Weighted

	sending sync.Mutex // held while a message is sent
	conn    io.Writer  // nil: the guest is not connected
}

// Open opens a directory of the host. The error says what keeps it from being served.
func Open(path string, opts Options) (*Dir, error) {
	root, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	d := &Dir{opts: opts, root: root, memory: semaphore.NewWeighted(maxMemory)}
	if err := d.prepare(); err != nil {
		_ = unix.Close(root)
		return nil, &os.PathError{Op: "serve", Path: path, Err: err}
	}
	return d, nil
}

func (d *Dir) prepare() error {
	if err := refuseKernelFS(d.root); err != nil {
		return err
	}
	st, err := fstat(d.root)
	if err != nil {
		return err
	}
	d.file = idOf(st)
	fd, err := d.openBeneath(".", unix.O_PATH)
	if err != nil {
		return fmt.Errorf("openat2: %w", err)
	}
	_ = unix.Close(fd)
	d.nodes.dropped = d.unwatch
	d.reset(st)
	d.startWatching()
	return nil
}

// SetOwner says which user and group of the guest everything is owned by: root without. It is called
// before [Dir.Serve].
func (d *Dir) SetOwner(uid, gid uint32) { d.uid, d.gid = uid, gid }

// reset forgets all that a guest knew.
func (d *Dir) reset(st *unix.Stat_t) {
	d.handles.closeAll()
	d.nodes.reset(&node{id: rootID, file: d.file, kind: unix.S_IFDIR, told: toldOf(st)})
}

// Close closes the directory and all files in it that the guest has open. Nobody may serve it.
func (d *Dir) Close() error {
	d.stopWatching()
	d.handles.closeAll()
	return unix.Close(d.root)
}

// Serve answers the requests that come by conn, until it ends or breaks the protocol, or ctx is
// done. It closes conn, and returns when the last request has been answered. The guest goes on
// where it was when Serve is called again.
func (d *Dir) Serve(ctx context.Context, conn io.ReadWriteCloser) error {
	closed := sync.OnceFunc(func() { _ = conn.Close() })
	defer context.AfterFunc(ctx, closed)()
	d.connect(conn)
	var working sync.WaitGroup
	err := d.readRequests(ctx, conn, &working)
	closed()
	working.Wait()
	d.connect(nil)
	if errors.Is(err, io.EOF) || ctx.Err() != nil {
		return nil
	}
	return err
}

func (d *Dir) connect(conn io.Writer) {
	d.sending.Lock()
	defer d.sending.Unlock()
	d.conn = conn
}

func (d *Dir) readRequests(ctx context.Context, conn io.Reader, working *sync.WaitGroup) error {
	turns := make(chan struct{}, maxInFlight)
	header := make([]byte, requestHeader)
	for {
		if _, err := io.ReadFull(conn, header); err != nil {
			return err
		}
		length := int(binary.NativeEndian.Uint32(header))
		if length < requestHeader || length > maxRequest {
			return fmt.Errorf("request of %d bytes", length)
		}
		cost := int64(length)
		if err := d.memory.Acquire(ctx, cost); err != nil {
			return err
		}
		body := make([]byte, length-requestHeader)
		if _, err := io.ReadFull(conn, body); err != nil {
			d.memory.Release(cost)
			return err
		}
		asked := &request{
			op:     opcode(binary.NativeEndian.Uint32(header[4:])),
			unique: binary.NativeEndian.Uint64(header[8:]),
			node:   binary.NativeEndian.Uint64(header[16:]),
			body:   fields{rest: body},
			cost:   cost,
		}
		if d.answersNothing(asked) {
			d.memory.Release(cost)
			continue
		}
		turns <- struct{}{}
		working.Go(func() {
			defer func() {
				d.memory.Release(asked.cost)
				<-turns
			}()
			d.work(ctx, asked)
		})
	}
}

// answersNothing does what needs no answer.
func (d *Dir) answersNothing(asked *request) bool {
	switch asked.op {
	case opForget:
		if lookups := asked.body.u64(); !asked.body.short {
			d.nodes.forget(asked.node, lookups)
		}
	case opBatchForget:
		count := asked.body.u32()
		asked.body.skip(4)
		for range count {
			id, lookups := asked.body.u64(), asked.body.u64()
			if asked.body.short {
				break
			}
			d.nodes.forget(id, lookups)
		}
	case opInterrupt: // requests are short
	default:
		return false
	}
	return true
}

// work answers one request.
func (d *Dir) work(ctx context.Context, asked *request) {
	do, known := operations[asked.op]
	var reply *answer
	var err error = unix.ENOSYS
	switch {
	case !known:
	case do.changes && d.opts.ReadOnly:
		err = unix.EROFS
	default:
		reply, err = do.run(d, ctx, asked)
		if err == nil {
			err = asked.body.err()
		}
	}
	if err != nil || reply == nil {
		reply = newAnswer(0)
	}
	d.send(reply.seal(asked.unique, -int32(errnoOf(err))))
}

// send sends a message. If that fails the reading ends as well.
func (d *Dir) send(message []byte) {
	d.sending.Lock()
	defer d.sending.Unlock()
	if d.conn != nil {
		_, _ = d.conn.Write(message)
	}
}

// errnoOf returns an error as the guest's kernel takes it; zero: there is none.
func errnoOf(err error) unix.Errno {
	if err == nil {
		return 0
	}
	// Larger ones are the kernel's own; it takes answers with them for broken.
	if errno, ok := errors.AsType[unix.Errno](err); ok && errno > 0 && errno < 512 {
		return errno
	}
	return unix.EIO
}

// operation is how one kind of request is answered.
type operation struct {
	run     func(d *Dir, ctx context.Context, asked *request) (*answer, error)
	changes bool // the directory
}

// operations are those that there are; the guest's kernel does the others itself, or without.
var operations = map[opcode]operation{
	opInit:          {run: (*Dir).init},
	opDestroy:       {run: func(*Dir, context.Context, *request) (*answer, error) { return nil, nil }},
	opLookup:        {run: (*Dir).lookup},
	opGetattr:       {run: (*Dir).getattr},
	opSetattr:       {run: (*Dir).setattr, changes: true},
	opReadlink:      {run: (*Dir).readlink},
	opSymlink:       {run: (*Dir).symlink, changes: true},
	opMknod:         {run: (*Dir).mknod, changes: true},
	opMkdir:         {run: (*Dir).mkdir, changes: true},
	opUnlink:        {run: (*Dir).unlink, changes: true},
	opRmdir:         {run: (*Dir).rmdir, changes: true},
	opRename:        {run: (*Dir).rename, changes: true},
	opRename2:       {run: (*Dir).rename, changes: true},
	opLink:          {run: (*Dir).hardLink, changes: true},
	opOpen:          {run: (*Dir).open},
	opCreate:        {run: (*Dir).create, changes: true},
	opRead:          {run: (*Dir).read},
	opWrite:         {run: (*Dir).write, changes: true},
	opRelease:       {run: (*Dir).release},
	opFsync:         {run: (*Dir).fsync},
	opFallocate:     {run: (*Dir).fallocate, changes: true},
	opLseek:         {run: (*Dir).lseek},
	opCopyFileRange: {run: (*Dir).copyFileRange, changes: true},
	opOpendir:       {run: (*Dir).opendir},
	opReaddir:       {run: (*Dir).readdir},
	opReaddirplus:   {run: (*Dir).readdir},
	opReleasedir:    {run: (*Dir).release},
	opFsyncdir:      {run: (*Dir).fsync},
	opStatfs:        {run: (*Dir).statfs},
	opGetxattr:      {run: (*Dir).getxattr},
	opListxattr:     {run: (*Dir).listxattr},
	opSetxattr:      {run: (*Dir).setxattr, changes: true},
	opRemovexattr:   {run: (*Dir).removexattr, changes: true},
}

// init agrees on what both ends can do.
func (d *Dir) init(_ context.Context, asked *request) (*answer, error) {
	major, _, readahead, abilities := asked.body.u32(), asked.body.u32(), asked.body.u32(), asked.body.u32()
	if asked.body.short || major < protocolMajor {
		return nil, unix.EPROTO
	}
	st, err := fstat(d.root)
	if err != nil {
		return nil, err
	}
	d.reset(st)
	a := newAnswer(64)
	a.u32(protocolMajor)
	a.u32(protocolMinor)
	a.u32(max(readahead, maxIO))
	a.u32(abilities & wantedAbilities)
	a.u16(maxInFlight)         // requests in the background
	a.u16(maxInFlight * 3 / 4) // from which on it counts as congested
	a.u32(maxIO)
	a.u32(1) // the granularity of times, in nanoseconds
	a.u16(maxIO / pageSize)
	a.u16(0)
	a.zero(32)
	return a, nil
}

// validity is how long the guest may rely on what it was told.
type validity struct{ entry, attr time.Duration }

func (a *answer) seconds(entry, attr time.Duration) {
	a.u64(uint64(entry / time.Second))
	a.u64(uint64(attr / time.Second))
	a.u32(uint32(entry % time.Second))
	a.u32(uint32(attr % time.Second))
}
