package hostdir

import (
	"context"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/dirfd"
	"github.com/smolvm/smolvm/internal/fuserelay"
)

// fstat returns the attributes of an open file.
func fstat(fd int) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := dirfd.Retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return nil, err
	}
	return &st, nil
}

// fstatat returns the attributes of an entry of an open directory.
func fstatat(dir int, name string) (*unix.Stat_t, error) {
	st, err := dirfd.Lstat(dir, name)
	return &st, err
}

// procPath is a path that leads to an open file itself, whatever it is.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// openBeneath opens a path below the directory, without following any link.
func (d *Dir) openBeneath(path string, flags uint64) (fd int, err error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err = unix.Openat2(d.root, path, &how)
		if err != unix.EINTR && err != unix.EAGAIN { // EAGAIN: there was a rename meanwhile
			return fd, err
		}
	}
}

// openNode opens a node as it is, neither for reading nor for writing (O_PATH). The guest looks
// it up again if it is not where it was (ESTALE).
func (d *Dir) openNode(n *node) (fd int, err error) {
	for _, path := range d.nodes.paths(n) {
		fd, err := d.openBeneath(path, unix.O_PATH)
		if err != nil {
			continue
		}
		if st, err := fstat(fd); err == nil && idOf(st) == n.file && st.Mode&unix.S_IFMT == n.kind {
			return fd, nil
		}
		_ = unix.Close(fd)
	}
	return -1, unix.ESTALE
}

// openDir opens a node that is a directory, as openNode does.
func (d *Dir) openDir(id uint64) (*node, int, error) {
	n, err := d.nodes.get(id)
	if err != nil {
		return nil, -1, err
	}
	if n.kind != unix.S_IFDIR {
		return nil, -1, unix.ENOTDIR
	}
	fd, err := d.openNode(n)
	return n, fd, err
}

// withNode calls do with a descriptor of a node: that of a handle of it, if the guest names one
// or the node has no name any more, else one of openNode.
func (d *Dir) withNode(n *node, handle uint64, do func(fd int) error) error {
	if handle != 0 {
		if h, err := d.handles.use(handle, n); err == nil {
			defer h.done()
			return do(h.fd)
		}
	}
	fd, err := d.openNode(n)
	if err == nil {
		defer func() { _ = unix.Close(fd) }()
		return do(fd)
	}
	h := d.handles.of(n)
	if h == nil {
		return err
	}
	defer h.done()
	return do(h.fd)
}

// kernelFS are file systems that are no files of anybody's, and by which processes are steered.
var kernelFS = map[int64]bool{
	unix.PROC_SUPER_MAGIC: true, unix.SYSFS_MAGIC: true, unix.SECURITYFS_MAGIC: true, unix.DEBUGFS_MAGIC: true,
	unix.TRACEFS_MAGIC: true, unix.CGROUP_SUPER_MAGIC: true, unix.CGROUP2_SUPER_MAGIC: true, unix.BPF_FS_MAGIC: true,
	unix.DEVPTS_SUPER_MAGIC: true, unix.SELINUX_MAGIC: true, unix.EFIVARFS_MAGIC: true, 0x62656570: true, // configfs
}

// refuseKernelFS returns an error if an open file is the kernel's.
func refuseKernelFS(fd int) error {
	var fs unix.Statfs_t
	if err := dirfd.Retry(func() error { return unix.Fstatfs(fd, &fs) }); err != nil {
		return err
	}
	if kernelFS[int64(fs.Type)] { //nolint:unconvert // its type depends on the architecture
		return unix.EACCES
	}
	return nil
}

// entryIn finds an entry of an open directory.
func (d *Dir) entryIn(parent *node, dir int, name string) (*unix.Stat_t, error) {
	st, err := fstatat(dir, name)
	if err == nil && st.Dev != parent.file.dev && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		var fd int
		if fd, err = unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err == nil {
			err = refuseKernelFS(fd)
			_ = unix.Close(fd)
		}
	}
	return st, err
}

// entry answers with an entry of an open directory, which the guest knows from now on.
func (d *Dir) entry(parent *node, dir int, name string) (*answer, error) {
	d.watch(parent, dir)
	st, err := d.entryIn(parent, dir, name)
	if err != nil {
		return nil, err
	}
	n, err := d.nodes.found(parent, name, st)
	if err != nil {
		return nil, err
	}
	a := newAnswer(entrySize)
	d.putEntry(a, n, st)
	return a, nil
}

// putEntry adds a struct fuse_entry_out.
func (d *Dir) putEntry(a *answer, n *node, st *unix.Stat_t) {
	a.u64(n.id)
	a.u64(0) // generation: numbers are never used again
	v := d.validityOf(n, st)
	a.seconds(v.entry, v.attr)
	d.putAttr(a, st)
}

// putAttr adds a struct fuse_attr.
func (d *Dir) putAttr(a *answer, st *unix.Stat_t) {
	ino := st.Ino
	if st.Dev != d.file.dev { // another file system below the directory
		ino ^= st.Dev << 40
	}
	for _, v := range []uint64{
		ino, uint64(st.Size), uint64(st.Blocks),
		uint64(st.Atim.Sec), uint64(st.Mtim.Sec), uint64(st.Ctim.Sec),
	} {
		a.u64(v)
	}
	mode := st.Mode &^ (unix.S_ISUID | unix.S_ISGID)
	for _, v := range []uint32{
		uint32(st.Atim.Nsec), uint32(st.Mtim.Nsec), uint32(st.Ctim.Nsec),
		mode, uint32(st.Nlink), d.uid, d.gid, 0, uint32(st.Blksize), 0,
	} {
		a.u32(v)
	}
}

func (d *Dir) attr(n *node, st *unix.Stat_t) *answer {
	a := newAnswer(16 + attrSize)
	a.u64(uint64(d.validityOf(n, st).attr.Seconds()))
	a.zero(8)
	d.nodes.tell(n, st)
	d.putAttr(a, st)
	return a
}

// The probe is a file in the root that is in no list; see [fuserelay.ProbeName]. It can be opened,
// and nothing else.
const (
	probeID   = 2
	probeName = fuserelay.ProbeName
)

// probe answers a lookup of the probe.
func (d *Dir) probe() *answer {
	a := newAnswer(entrySize)
	a.u64(probeID)
	a.u64(0)
	a.seconds(0, time.Minute)
	d.putAttr(a, &unix.Stat_t{Dev: d.file.dev, Ino: probeID, Mode: unix.S_IFREG, Nlink: 1})
	return a
}

func (d *Dir) lookup(_ context.Context, asked *request) (*answer, error) {
	if asked.node == rootID && string(asked.body.rest) == probeName+"\x00" {
		return d.probe(), nil
	}
	return d.inDir(asked, d.entry)
}

// inDir calls do with the directory of a request, which is open, and the name that comes next in it.
func (d *Dir) inDir(asked *request, do func(parent *node, dir int, name string) (*answer, error)) (*answer, error) {
	name, err := asked.body.name()
	if err != nil {
		return nil, err
	}
	parent, dir, err := d.openDir(asked.node)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(dir) }()
	return do(parent, dir, name)
}

func (d *Dir) getattr(_ context.Context, asked *request) (*answer, error) {
	flags, _, handle := asked.body.u32(), asked.body.u32(), asked.body.u64()
	n, err := d.nodes.get(asked.node)
	if err != nil {
		return nil, err
	}
	if flags&getattrHandle == 0 {
		handle = 0
	}
	var st *unix.Stat_t
	err = d.withNode(n, handle, func(fd int) (err error) {
		st, err = fstat(fd)
		return err
	})
	if err != nil {
		return nil, err
	}
	return d.attr(n, st), nil
}

// changes are what a SETATTR asks for.
type changes struct {
	valid        uint32
	handle       uint64
	size         int64
	atime, mtime unix.Timespec
	mode         uint32
}

func changesOf(body *fields) changes {
	var c changes
	c.valid = body.u32()
	body.skip(4)
	c.handle, c.size = body.u64(), int64(body.u64())
	body.skip(8)
	c.atime.Sec, c.mtime.Sec = int64(body.u64()), int64(body.u64())
	body.skip(8)
	c.atime.Nsec, c.mtime.Nsec = int64(body.u32()), int64(body.u32())
	body.skip(4)
	c.mode = body.u32()
	if c.valid&setHandle == 0 {
		c.handle = 0
	}
	return c
}

// times returns the times to set, for utimensat(2).
func (c changes) times() []unix.Timespec {
	pick := func(set, now uint32, value unix.Timespec) unix.Timespec {
		switch {
		case c.valid&now != 0:
			return unix.Timespec{Nsec: unix.UTIME_NOW}
		case c.valid&set != 0 && value.Nsec >= 0 && value.Nsec < 1e9:
			return value
		}
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	}
	return []unix.Timespec{pick(setAtime, setAtimeNow, c.atime), pick(setMtime, setMtimeNow, c.mtime)}
}

// setattr changes attributes. Owners are those of the host, and a change of them is ignored, so
// that programs that unpack archives as root go on.
func (d *Dir) setattr(_ context.Context, asked *request) (*answer, error) {
	c := changesOf(&asked.body)
	if err := asked.body.err(); err != nil {
		return nil, err
	}
	n, err := d.nodes.get(asked.node)
	if err != nil {
		return nil, err
	}
	var st *unix.Stat_t
	err = d.withNode(n, c.handle, func(fd int) (err error) {
		if err := d.change(n, fd, c); err != nil {
			return err
		}
		st, err = fstat(fd)
		return err
	})
	if err != nil {
		return nil, err
	}
	return d.attr(n, st), nil
}

// change changes attributes of an open file.
func (d *Dir) change(n *node, fd int, c changes) error {
	path := procPath(fd)
	if c.valid&setMode != 0 {
		if n.kind == unix.S_IFLNK {
			return unix.EOPNOTSUPP
		}
		if err := dirfd.Retry(func() error { return unix.Chmod(path, c.mode&(unix.S_ISVTX|0o777)) }); err != nil {
			return err
		}
	}
	if c.valid&setSize != 0 {
		if n.kind != unix.S_IFREG || c.size < 0 {
			return unix.EINVAL
		}
		if err := d.clearSetID(fd); err != nil {
			return err
		}
		if err := truncate(fd, c); err != nil {
			return err
		}
	}
	if c.valid&(setAtime|setMtime|setAtimeNow|setMtimeNow) == 0 {
		return nil
	}
	times := c.times()
	if n.kind == unix.S_IFLNK {
		return dirfd.Retry(func() error { return unix.UtimesNanoAt(fd, "", times, unix.AT_EMPTY_PATH) })
	}
	return dirfd.Retry(func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, path, times, 0) })
}

// truncate cuts an open file, by its handle if the guest named one that can write.
func truncate(fd int, c changes) error {
	if c.handle != 0 {
		if err := dirfd.Retry(func() error { return unix.Ftruncate(fd, c.size) }); err != unix.EBADF && err != unix.EINVAL { //nolint:errorlint // bare
			return err
		}
	}
	return dirfd.Retry(func() error { return unix.Truncate(procPath(fd), c.size) })
}

// clearSetID takes the set-id bits of an open file away before it is written to: the kernel does
// not where this process is root.
func (d *Dir) clearSetID(fd int) error {
	st, err := fstat(fd)
	if err != nil || st.Mode&(unix.S_ISUID|unix.S_ISGID) == 0 {
		return err
	}
	return dirfd.Retry(func() error { return unix.Chmod(procPath(fd), st.Mode&(unix.S_ISVTX|0o777)) })
}

func (d *Dir) readlink(_ context.Context, asked *request) (*answer, error) {
	n, err := d.nodes.get(asked.node)
	if err != nil {
		return nil, err
	}
	if n.kind != unix.S_IFLNK {
		return nil, unix.EINVAL
	}
	a := newAnswer(maxTarget)
	err = d.withNode(n, 0, func(fd int) error {
		text := make([]byte, maxTarget)
		size, err := unix.Readlinkat(fd, "", text)
		if err == nil {
			a.raw(text[:size])
		}
		return err
	})
	return a, err
}

func (d *Dir) statfs(context.Context, *request) (*answer, error) {
	var fs unix.Statfs_t
	if err := dirfd.Retry(func() error { return unix.Fstatfs(d.root, &fs) }); err != nil {
		return nil, err
	}
	a := newAnswer(80)
	for _, v := range []uint64{fs.Blocks, fs.Bfree, fs.Bavail, fs.Files, fs.Ffree} {
		a.u64(v)
	}
	for _, v := range []uint32{uint32(fs.Bsize), maxName, uint32(fs.Frsize), 0} {
		a.u32(v)
	}
	a.zero(24)
	return a, nil
}
