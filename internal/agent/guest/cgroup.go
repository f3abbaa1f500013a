package guest

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// cgroupMount is where version 2 of the kernel's control groups is; see cgroups(7).
	cgroupMount = "/sys/fs/cgroup"
	// cgroupMagic is the type of its file system (CGROUP2_SUPER_MAGIC).
	cgroupMagic = 0x63677270
	// cgroupParent has a group for each command that runs.
	cgroupParent = cgroupMount + "/smolvm"
)

// cgroups are control groups of commands: by its group all that a command has started can
// be ended, in whatever session it is. Making one costs an emulated guest half as much as
// starting a program, so those that are empty again are used again.
type cgroups struct {
	mu   sync.Mutex
	made int
	free []*cgroup
	left []*cgroup // whose command has ended and has left something running
}

// cgroup is one control group.
type cgroup struct {
	dir    *os.File
	events *os.File // reports whether there are processes in it
}

// take returns a group with nothing in it; nil if there are no groups.
func (g *cgroups) take() *cgroup {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.free) == 0 {
		g.reclaim()
	}
	if n := len(g.free); n > 0 {
		group := g.free[n-1]
		g.free = g.free[:n-1]
		return group
	}
	group, err := g.create()
	if err != nil {
		return nil // not mounted yet, or not part of this kernel
	}
	return group
}

// put takes back the group of a command that has ended; nil is fine.
func (g *cgroups) put(group *cgroup) {
	if group == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if group.empty() {
		g.free = append(g.free, group)
	} else {
		g.left = append(g.left, group)
	}
}

// reclaim frees the groups whose last process has ended.
func (g *cgroups) reclaim() {
	left := g.left[:0]
	for _, group := range g.left {
		if group.empty() {
			g.free = append(g.free, group)
		} else {
			left = append(left, group)
		}
	}
	clear(g.left[len(left):])
	g.left = left
}

func (g *cgroups) create() (*cgroup, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(cgroupMount, &stat); err != nil {
		return nil, err
	}
	if stat.Type != cgroupMagic {
		return nil, errors.ErrUnsupported
	}
	g.made++
	path := filepath.Join(cgroupParent, strconv.Itoa(g.made))
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	events, err := os.Open(filepath.Join(path, "cgroup.events"))
	if err != nil {
		_ = dir.Close()
		return nil, err
	}
	return &cgroup{dir, events}, nil
}

func (c *cgroup) close() { _, _ = c.dir.Close(), c.events.Close() }

func (c *cgroup) fd() int { return int(c.dir.Fd()) }

// empty reports whether nothing runs in the group or in one below it.
func (c *cgroup) empty() bool {
	text := make([]byte, 256)
	n, _ := c.events.ReadAt(text, 0)
	return bytes.Contains(text[:n], []byte("populated 0"))
}

// kill kills all processes of the group. Kernels before 5.14 can't do that themselves; a
// process that goes on forking can outrun us there for as long as it can outrun our scan.
func (c *cgroup) kill() {
	if c == nil {
		return
	}
	err := os.WriteFile(filepath.Join(c.dir.Name(), "cgroup.kill"), []byte("1"), 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return
	}
	for range 100 {
		text, err := os.ReadFile(filepath.Join(c.dir.Name(), "cgroup.procs"))
		pids := bytes.Fields(text)
		if err != nil || len(pids) == 0 {
			return
		}
		for _, field := range pids {
			if pid, err := strconv.Atoi(string(field)); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
	}
}
