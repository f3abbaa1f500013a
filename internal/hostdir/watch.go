package hostdir

import (
	"bytes"
	"encoding/binary"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxWatches bounds how many directories are watched for a guest.
	maxWatches = 8192
	// ownTime is how long after a write of the guest a change of the file is taken for that.
	ownTime = 100 * time.Millisecond

	watchedEvents = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_ONLYDIR
)

// remoteFS are file systems whose changes this host's kernel does not know of all.
var remoteFS = map[int64]bool{
	unix.NFS_SUPER_MAGIC: true, unix.SMB_SUPER_MAGIC: true, unix.SMB2_SUPER_MAGIC: true, unix.CIFS_SUPER_MAGIC: true,
	unix.FUSE_SUPER_MAGIC: true, unix.V9FS_MAGIC: true, unix.CEPH_SUPER_MAGIC: true, unix.AFS_SUPER_MAGIC: true, unix.CODA_SUPER_MAGIC: true,
}

// watcher watches the directories in which a guest has looked something up.
type watcher struct {
	events *os.File // nil: nothing is watched
	fd     int
	done   chan struct{}
}

// startWatching begins to watch. Without, the guest asks again sooner.
func (d *Dir) startWatching() {
	var fs unix.Statfs_t
	if unix.Fstatfs(d.root, &fs) != nil || remoteFS[int64(fs.Type)] { //nolint:unconvert // its type depends on the architecture
		return
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return
	}
	d.watcher = watcher{fd: fd, events: os.NewFile(uintptr(fd), "inotify"), done: make(chan struct{})}
	go d.follow()
}

// stopWatching ends the watching.
func (d *Dir) stopWatching() {
	if d.watcher.events == nil {
		return
	}
	_ = d.watcher.events.Close()
	<-d.watcher.done
}

// watch watches an open directory, before it is looked at.
func (d *Dir) watch(n *node, dir int) {
	if d.watcher.events == nil {
		return
	}
	d.nodes.mu.Lock()
	defer d.nodes.mu.Unlock()
	if n.watch != 0 || len(d.nodes.watches) >= maxWatches || d.nodes.nodes[n.id] != n {
		return
	}
	wd, err := unix.InotifyAddWatch(d.watcher.fd, procPath(dir), watchedEvents)
	if err != nil {
		return // the host's limit is reached
	}
	n.watch = wd
	d.nodes.watches[wd] = n
}

// unwatch ends the watching of a node. The table's lock is held.
func (d *Dir) unwatch(n *node) {
	if n.watch == 0 {
		return
	}
	delete(d.nodes.watches, n.watch)
	_, _ = unix.InotifyRmWatch(d.watcher.fd, uint32(n.watch)) // it may be gone with the directory
	n.watch = 0
}

// watched reports whether the last directory in which a node was found is watched, and whether all
// of them are.
func (d *Dir) watched(n *node) (last, all bool) {
	d.nodes.mu.Lock()
	defer d.nodes.mu.Unlock()
	for _, l := range n.links {
		last = l.parent.watch != 0
		if !last {
			return false, false
		}
	}
	return last, last
}

// follow tells the guest of what changes on the host.
func (d *Dir) follow() {
	defer close(d.watcher.done)
	buffer := make([]byte, 64<<10)
	for {
		n, err := d.watcher.events.Read(buffer)
		if err != nil {
			return
		}
		for rest := buffer[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			wd := int(int32(binary.NativeEndian.Uint32(rest)))
			mask := binary.NativeEndian.Uint32(rest[4:])
			size := int(binary.NativeEndian.Uint32(rest[12:]))
			name := rest[unix.SizeofInotifyEvent:min(unix.SizeofInotifyEvent+size, len(rest))]
			rest = rest[min(unix.SizeofInotifyEvent+size, len(rest)):]
			if end := bytes.IndexByte(name, 0); end >= 0 {
				name = name[:end]
			}
			d.changed(wd, mask, string(name))
		}
	}
}

// changed tells the guest of one event, if it does not know.
func (d *Dir) changed(wd int, mask uint32, name string) {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		d.forgetAll()
		return
	}
	d.nodes.mu.Lock()
	parent := d.nodes.watches[wd]
	if parent != nil && mask&unix.IN_IGNORED != 0 { // the directory is gone
		delete(d.nodes.watches, wd)
		parent.watch = 0
	}
	var child *node
	if parent != nil && name != "" {
		child = d.nodes.byName[link{parent, name}]
	}
	d.nodes.mu.Unlock()
	if child == nil {
		return // the guest knows of no such name
	}
	dir, err := d.openNode(parent)
	if err != nil {
		d.invalidateEntry(parent, name)
		return
	}
	defer func() { _ = unix.Close(dir) }()
	st, err := fstatat(dir, name)
	switch {
	case err != nil || idOf(st) != child.file || st.Mode&unix.S_IFMT != child.kind:
		d.invalidateEntry(parent, name)
	case d.nodes.isNews(child, st):
		d.invalidate(child)
	}
}

// isNews reports whether a guest does not know the attributes of a file, nor has just written to it.
func (t *table) isNews(n *node, st *unix.Stat_t) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !n.told.same(st) && time.Since(n.written) > ownTime
}

// wrote notes that the guest has written to a file: its kernel knows that the attributes have changed.
func (t *table) wrote(n *node) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	n.written = now
}

// forgetAll has the guest look up anew all that it knows: events were lost.
func (d *Dir) forgetAll() {
	d.nodes.mu.Lock()
	links := make([]link, 0, len(d.nodes.byName))
	for l := range d.nodes.byName {
		links = append(links, l)
	}
	d.nodes.mu.Unlock()
	for _, l := range links {
		d.invalidateEntry(l.parent, l.name)
	}
}

// invalidateEntry has the guest's kernel look up a name again.
func (d *Dir) invalidateEntry(parent *node, name string) {
	a := newAnswer(16 + len(name) + 1)
	a.u64(parent.id)
	a.u32(uint32(len(name)))
	a.u32(0)
	a.raw([]byte(name))
	a.zero(1)
	d.send(a.seal(0, notifyEntry))
}
