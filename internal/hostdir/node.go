package hostdir

import (
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// rootID is the number of the directory's own node; FUSE_ROOT_ID.
	rootID = 1
	// maxNodes bounds how many files a guest may have looked up and not forgotten.
	maxNodes = 1 << 19
	// maxLinks bounds how many names of one file are remembered.
	maxLinks = 8
	// maxPath bounds a path, in bytes, and with it how deep a tree may be; PATH_MAX.
	maxPath = 4095
)

// fileID is which file of the host a node is.
type fileID struct{ dev, ino uint64 }

// node is a file that the guest has looked up. It holds no descriptor: where it is is found out
// anew each time, from the directory down, so that what has left the directory can't be reached.
type node struct {
	id   uint64
	file fileID
	kind uint32 // S_IFMT of the mode

	// The following are guarded by the table's lock.
	lookups uint64
	links   []link // names under which it was found, the newest last
	told    told
	written time.Time // by the guest, the last time
	watch   int       // of the directory's entries; zero: there is none
}

// link is a name of a node.
type link struct {
	parent *node
	name   string
}

// told is what the guest was last told of a file, and when.
type told struct {
	size         int64
	mtime, ctime unix.Timespec
	at           time.Time
}

func toldOf(st *unix.Stat_t) told {
	return told{size: st.Size, mtime: st.Mtim, ctime: st.Ctim, at: time.Now()}
}

// same reports whether a file is still as the guest was told.
func (t told) same(st *unix.Stat_t) bool {
	return t.size == st.Size && t.mtime == st.Mtim && t.ctime == st.Ctim
}

// tick is longer than the time in which two changes of a file can have the same time stamp.
const tick = 50 * time.Millisecond

// settled reports whether a later change of the file would have shown as another time stamp.
func (t told) settled() bool {
	return t.at.Sub(time.Unix(t.ctime.Unix())) > tick && t.at.Sub(time.Unix(t.mtime.Unix())) > tick
}

// table is the nodes that a guest knows.
type table struct {
	mu     sync.Mutex
	nodes  map[uint64]*node
	byFile map[fileID]*node
	// byName has the links of all nodes, and watches the directories that are watched.
	byName  map[link]*node
	watches map[int]*node
	last    uint64
	dropped func(*node) // called for each node that is forgotten
}

func (t *table) reset(root *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, n := range t.watches {
		t.dropped(n)
	}
	t.nodes, t.byFile = map[uint64]*node{rootID: root}, map[fileID]*node{root.file: root}
	t.byName, t.watches = map[link]*node{}, map[int]*node{}
	t.last = max(t.last, probeID)
}

// get returns a node that the guest names.
func (t *table) get(id uint64) (*node, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nodes[id]; n != nil {
		return n, nil
	}
	return nil, unix.ESTALE
}

// found returns the node of a file that was found in a directory, and counts that the guest is
// told of it.
func (t *table) found(parent *node, name string, st *unix.Stat_t) (*node, error) {
	file, kind := idOf(st), st.Mode&unix.S_IFMT
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.byFile[file]
	if n == nil || n.kind != kind { // the number of a file that is gone may be that of another
		if len(t.nodes) >= maxNodes {
			return nil, unix.ENOMEM
		}
		t.last++
		n = &node{id: t.last, file: file, kind: kind}
		t.nodes[n.id], t.byFile[file] = n, n
	}
	n.lookups++
	t.link(n, parent, name)
	n.told = toldOf(st)
	return n, nil
}

// link notes a name of a node. The table's lock is held.
func (t *table) link(n, parent *node, name string) {
	if n.id == rootID {
		return
	}
	is := link{parent, name}
	if other := t.byName[is]; other != nil {
		t.unlink(other, is)
	}
	most := maxLinks
	if n.kind == unix.S_IFDIR {
		most = 1
	}
	for len(n.links) >= most {
		t.unlink(n, n.links[0])
	}
	n.links = append(n.links, is)
	t.byName[is] = n
}

// unlink forgets a name of a node. The table's lock is held.
func (t *table) unlink(n *node, is link) {
	if i := slices.Index(n.links, is); i >= 0 {
		n.links = slices.Delete(n.links, i, i+1)
	}
	if t.byName[is] == n {
		delete(t.byName, is)
	}
}

// moved notes that the guest has renamed what a name of a directory was the name of.
func (t *table) moved(file fileID, from *node, oldName string, to *node, newName string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.byFile[file]; n != nil {
		t.unlink(n, link{from, oldName})
		t.link(n, to, newName)
	}
}

// tell notes what the guest is told of a file.
func (t *table) tell(n *node, st *unix.Stat_t) {
	now := toldOf(st)
	t.mu.Lock()
	defer t.mu.Unlock()
	n.told = now
}

// forget takes back so many lookups of a node.
func (t *table) forget(id, lookups uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[id]
	if n == nil || id == rootID {
		return
	}
	if lookups < n.lookups {
		n.lookups -= lookups
		return
	}
	delete(t.nodes, id)
	for len(n.links) > 0 {
		t.unlink(n, n.links[0])
	}
	t.dropped(n)
	if t.byFile[n.file] == n {
		delete(t.byFile, n.file)
	}
}

// paths returns the paths under which a node may be found, the most likely one first.
func (t *table) paths(n *node) []string {
	if n.id == rootID {
		return []string{"."}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	paths := make([]string, 0, 1)
	for _, link := range slices.Backward(n.links) {
		if path, ok := link.path(); ok {
			paths = append(paths, path)
		}
	}
	return paths
}

// path returns the path of a link. There is none if it is too long: after renames on the host
// nodes may even seem to be in one another. The table's lock is held.
func (l link) path() (string, bool) {
	names, length := []string{l.name}, len(l.name)
	for n := l.parent; n.id != rootID; n = n.links[len(n.links)-1].parent {
		if len(n.links) == 0 {
			return "", false
		}
		name := n.links[len(n.links)-1].name
		names = append(names, name)
		if length += len(name) + 1; length > maxPath {
			return "", false
		}
	}
	slices.Reverse(names)
	return strings.Join(names, "/"), true
}

func idOf(st *unix.Stat_t) fileID { return fileID{dev: st.Dev, ino: st.Ino} }
