package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Limits are what a group may take together. Zero: as much as there is.
type Limits struct {
	// MemoryBytes counts what the host keeps in memory for the group, the page cache of
	// its files too; that is given back before anything is killed.
	MemoryBytes int64
	// CPUs is how many processors' time the group gets, as in 1.5.
	CPUs float64
	// Tasks counts processes and threads.
	Tasks int
}

// needs lists the controllers that the limits take.
func (l Limits) needs() []string {
	var needed []string
	if l.MemoryBytes > 0 {
		needed = append(needed, Memory)
	}
	if l.Tasks > 0 {
		needed = append(needed, PIDs)
	}
	if l.CPUs > 0 {
		needed = append(needed, CPU)
	}
	return needed
}

// Group is a group that was made.
type Group struct {
	site Site
	name string
	// dirs are its directories, by controller. Those of version 2 are one.
	dirs map[string]string
	v2   string // empty: none
}

// ErrUnavailable reports that no group can be made for a limit.
var ErrUnavailable = errors.New("control groups can't be used")

// Create makes a group. Limits whose controllers can't be used here are left out, but for
// CPUs: nobody asks for them without need. The error matches [ErrUnavailable] then, or if
// nothing at all can be bounded.
func (s Site) Create(name string, limits Limits) (_ *Group, err error) {
	if limits.CPUs > 0 && s.Why(CPU) != nil {
		return nil, fmt.Errorf("%w for processor time: %w", ErrUnavailable, s.Why(CPU))
	}
	g := &Group{site: s, name: name, dirs: map[string]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Remove())
		}
	}()
	var inV2, missed []string
	for _, controller := range limits.needs() {
		switch {
		case s.v1[controller] != "":
			err = g.makeV1(controller)
		case s.Why(controller) == nil:
			inV2 = append(inV2, controller)
		default:
			missed = append(missed, fmt.Sprintf("%s: %v", controller, s.Why(controller)))
		}
		if err != nil {
			return nil, err
		}
	}
	if len(inV2) > 0 {
		if err := g.makeV2(inV2); err != nil {
			return nil, err
		}
	}
	switch {
	case len(g.dirs) == 0:
		return nil, fmt.Errorf("%w: %s", ErrUnavailable, strings.Join(missed, "; "))
	case limits.CPUs > 0 && !g.Has(CPU):
		return nil, fmt.Errorf("%w for processor time", ErrUnavailable)
	}
	return g, g.set(limits)
}

// makeV1 makes the group's directory of one controller.
func (g *Group) makeV1(controller string) error {
	dir := filepath.Join(g.site.v1[controller], parentName, g.name)
	if slices.Contains(slices.Collect(maps.Values(g.dirs)), dir) {
		g.dirs[controller] = dir // both are in one hierarchy
		return nil
	}
	err := makeIn(dir, func(parent string) error {
		err := makeParent(parent)
		// Older kernels let a group exceed the limits of those above otherwise.
		_ = write(filepath.Join(parent, "memory.use_hierarchy"), "1")
		return err
	})
	if err != nil {
		return fmt.Errorf("make control group: %w", err)
	}
	g.dirs[controller] = dir
	return nil
}

// makeIn makes a directory, whose parent is removed by whoever removes the last group in it.
func makeIn(dir string, prepare func(parent string) error) error {
	const attempts = 5
	for range attempts {
		if err := os.Mkdir(dir, 0o755); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := prepare(filepath.Dir(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return fmt.Errorf("%s is removed again and again", filepath.Dir(dir))
}

// makeParent makes the directory that groups are in, unless somebody else just has.
func makeParent(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make control group: %w", err)
	}
	return nil
}

// makeV2 makes the group's directory in the nearest place that has the controllers, or
// the memory's if none has all.
func (g *Group) makeV2(needed []string) error {
	var errs []error
	for _, wanted := range [][]string{needed, needed[:1]} {
		for _, place := range g.site.v2 {
			if slices.ContainsFunc(wanted, func(c string) bool { return !slices.Contains(place.controllers, c) }) {
				continue
			}
			dir, err := place.make(g.name, wanted)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			g.v2 = dir
			for _, controller := range needed {
				if slices.Contains(fields(filepath.Join(dir, "cgroup.controllers")), controller) {
					g.dirs[controller] = dir
				}
			}
			return nil
		}
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, errors.Join(errs...))
}

func (p v2Place) make(name string, wanted []string) (string, error) {
	parent := filepath.Join(p.dir, parentName)
	dir := filepath.Join(parent, name)
	prepare := func(parent string) error { return p.prepare(parent, wanted) }
	// Another group that is there may have been made for fewer limits.
	ready := fields(filepath.Join(parent, "cgroup.subtree_control"))
	if slices.ContainsFunc(wanted, func(c string) bool { return !slices.Contains(ready, c) }) {
		if err := prepare(parent); err != nil {
			return "", err
		}
	}
	if err := makeIn(dir, prepare); err != nil {
		return "", fmt.Errorf("make control group: %w", err)
	}
	return dir, nil
}

// prepare makes the directory that groups are in, and lets them have the controllers.
func (p v2Place) prepare(parent string, wanted []string) error {
	enable := func(dir string) error {
		for _, controller := range p.controllers {
			err := write(filepath.Join(dir, "cgroup.subtree_control"), "+"+controller)
			if err != nil && slices.Contains(wanted, controller) {
				return fmt.Errorf("let control groups bound %s: %w", controller, err)
			}
		}
		return nil
	}
	if err := enable(p.dir); err != nil {
		return err
	}
	if err := makeParent(parent); err != nil {
		return err
	}
	return enable(parent)
}

// period is the span of time, in microseconds, that a share of processor time is of: the
// kernel's default.
const period = 100_000

// minQuota is the least that the kernel takes; see cpu.max in cgroup-v2.rst.
const minQuota = 1000

// set writes the limits down for the controllers that the group has.
func (g *Group) set(limits Limits) error {
	quota := strconv.Itoa(max(int(limits.CPUs*period), minQuota))
	settings := []struct {
		controller, v2File, v2, v1File, v1 string
	}{
		{Memory, "memory.max", strconv.FormatInt(limits.MemoryBytes, 10), "memory.limit_in_bytes", strconv.FormatInt(limits.MemoryBytes, 10)},
		{PIDs, "pids.max", strconv.Itoa(limits.Tasks), "pids.max", strconv.Itoa(limits.Tasks)},
		{CPU, "cpu.max", quota + " " + strconv.Itoa(period), "cpu.cfs_quota_us", quota},
	}
	for _, s := range settings {
		dir := g.dirs[s.controller]
		if dir == "" || !slices.Contains(limits.needs(), s.controller) {
			continue
		}
		file, value := s.v1File, s.v1
		if dir == g.v2 {
			file, value = s.v2File, s.v2
		}
		if err := write(filepath.Join(dir, file), value); err != nil {
			return fmt.Errorf("bound %s: %w", s.controller, err)
		}
	}
	return nil
}

// SetCPUs gives a group that has a process already another limit of processor time.
func (g *Group) SetCPUs(cpus float64, pid int) error {
	limits := Limits{CPUs: cpus}
	if g.dirs[CPU] != "" {
		return g.set(limits)
	}
	if err := g.site.Why(CPU); err != nil {
		return fmt.Errorf("%w for processor time: %w", ErrUnavailable, err)
	}
	if g.site.v1[CPU] == "" {
		if !slices.Contains(fields(filepath.Join(g.v2, "cgroup.controllers")), CPU) {
			return fmt.Errorf("%w for processor time of a group that has none", ErrUnavailable)
		}
		g.dirs[CPU] = g.v2
		return g.set(limits)
	}
	if err := g.makeV1(CPU); err != nil {
		return err
	}
	if err := g.set(limits); err != nil {
		return err
	}
	return write(filepath.Join(g.dirs[CPU], "cgroup.procs"), strconv.Itoa(pid))
}

// Has reports whether the group bounds what a controller controls.
func (g *Group) Has(controller string) bool { return g.dirs[controller] != "" }

// Path returns the group's directory, that of the memory if there are several.
func (g *Group) Path() string {
	for _, controller := range controllers {
		if dir := g.dirs[controller]; dir != "" {
			return dir
		}
	}
	return ""
}

// Within returns what starts a program in the group from its first instruction on, for
// [proc.StartIn]. Close is to be called when it has been started.
//
// In version 2 the kernel makes the new process in the group. In version 1 a process is
// in the groups of the thread that forked it, so that thread goes there for a moment.
func (g *Group) Within(cmd *exec.Cmd) (within func(fork func() error) error, closeFD func(), err error) {
	closeFD = func() {}
	if g.v2 != "" {
		fd, err := unix.Open(g.v2, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, nil, &fs.PathError{Op: "open", Path: g.v2, Err: err}
		}
		closeFD = func() { _ = unix.Close(fd) }
		attr := &syscall.SysProcAttr{}
		if cmd.SysProcAttr != nil {
			*attr = *cmd.SysProcAttr
		}
		attr.UseCgroupFD, attr.CgroupFD = true, fd
		cmd.SysProcAttr = attr
	}
	return g.fork, closeFD, nil
}

// fork calls fork on a thread that is in the groups of version 1.
func (g *Group) fork(fork func() error) error {
	const thisThread = "0"
	for controller, dir := range g.dirs {
		if dir == g.v2 {
			continue
		}
		if err := write(filepath.Join(dir, "tasks"), thisThread); err != nil {
			return fmt.Errorf("enter control group: %w", err)
		}
		defer func() {
			// Where it may not go back it stays, and nothing else runs on it.
			_ = write(filepath.Join(g.site.v1[controller], "tasks"), thisThread)
		}()
	}
	return fork()
}

// Killed reports whether the kernel has killed something in the group for want of memory.
func (g *Group) Killed() bool {
	file := "memory.oom_control"
	if g.dirs[Memory] == g.v2 {
		file = "memory.events"
	}
	text, err := os.ReadFile(filepath.Join(g.dirs[Memory], file))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if count, found := strings.CutPrefix(line, "oom_kill "); found {
			return strings.TrimSpace(count) != "0"
		}
	}
	return false
}

// Remove removes the group, which has no processes any more.
func (g *Group) Remove() error {
	var errs []error
	for _, dir := range g.dirs {
		errs = append(errs, remove(dir))
		_ = unix.Rmdir(filepath.Dir(dir)) // if it is the last one
	}
	return errors.Join(errs...)
}

// remove removes a directory that may still hold a process or a thread that is ending.
func remove(dir string) error {
	const patience, interval = 500 * time.Millisecond, 5 * time.Millisecond
	deadline := time.Now().Add(patience)
	for {
		err := unix.Rmdir(dir)
		switch {
		case err == nil || errors.Is(err, unix.ENOENT):
			return nil
		case !errors.Is(err, unix.EBUSY) || time.Now().After(deadline):
			return &fs.PathError{Op: "remove control group", Path: dir, Err: err}
		}
		<-time.After(interval)
	}
}

// write writes to a file of the kernel's, which takes a value in one piece.
func write(path, value string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(value)
	return errors.Join(err, file.Close())
}

// IdleAge is how long a group may be without a process because one is only just being
// started in it, which takes some milliseconds.
const IdleAge = 10 * time.Second

// Tidy removes the groups where this Site makes them whose processes have ended without
// anybody to remove them.
func (s Site) Tidy() {
	parents := map[string]bool{}
	for _, dir := range s.v1 {
		parents[filepath.Join(dir, parentName)] = true
	}
	for _, place := range s.v2 {
		parents[filepath.Join(place.dir, parentName)] = true
	}
	for parent := range parents {
		entries, _ := os.ReadDir(parent)
		for _, entry := range entries {
			removeIdle(filepath.Join(parent, entry.Name()), entry, IdleAge)
		}
	}
}

// removeIdle removes a group that is older than age and has no process.
func removeIdle(path string, entry fs.DirEntry, age time.Duration) {
	if info, err := entry.Info(); err != nil || !info.IsDir() || time.Since(info.ModTime()) <= age {
		return
	}
	_ = unix.Rmdir(path) // one with processes stays: EBUSY
	_ = unix.Rmdir(filepath.Dir(path))
}

// Sweep removes the groups whose processes have ended without anybody to remove them,
// wherever they were made; those that are younger than age are left alone. It looks at all
// the groups of the host.
func Sweep(root string, age time.Duration) error {
	var errs []error
	for _, m := range readMounts(root) {
		top := filepath.Join(root, m.point)
		err := filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.IsDir() {
				return nil //nolint:nilerr // what can't be read is not ours
			}
			if filepath.Base(filepath.Dir(path)) != parentName {
				return nil
			}
			removeIdle(path, entry, age)
			return fs.SkipDir
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
