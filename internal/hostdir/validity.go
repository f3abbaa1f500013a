package hostdir

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// watchedTime is how long a guest may rely on what it was told of what is watched: it is told when
	// that changes. It is not longer, as what is written through memory maps is not noticed.
	watchedTime = 30 * time.Second
	// unwatchedTime is the same for what is not.
	unwatchedTime = time.Second
)

// validityOf returns how long the guest may rely on what it is told of a node that it found in a
// directory.
func (d *Dir) validityOf(n *node, st *unix.Stat_t) validity {
	watched, all := d.watched(n)
	v := validity{entry: unwatchedTime, attr: unwatchedTime}
	if watched {
		v.entry = watchedTime
	}
	// Other names of a file may be in directories that are not watched.
	if all && (st.Nlink == 1 || n.kind == unix.S_IFDIR) {
		v.attr = watchedTime
	}
	return v
}
