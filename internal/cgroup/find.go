// Package cgroup bounds what a program takes of the host, by the kernel's control groups:
// version 2, version 1, or some controllers of each, wherever this process may make groups.
// See cgroups(7).
//
// A group is made in a directory "smolvm" in the group that this process is in, so that
// what bounds this process bounds the new group too. Version 2 does not let a group have
// both processes and groups with limits, so there it is the nearest group above that
// allows it. Nothing needs to be remembered: a group without processes can be removed by
// anybody who finds it; see [Sweep].
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Controllers that bound a group.
const (
	Memory = "memory"
	PIDs   = "pids"
	CPU    = "cpu"
)

var controllers = []string{Memory, PIDs, CPU}

// parentName is the name of the directory that our groups are in.
const parentName = "smolvm"

// Site is where this process may make groups. The zero value is nowhere.
type Site struct {
	// v1 are the directories of version 1 in which groups can be made, by controller.
	v1 map[string]string
	// v2 are those of version 2, the nearest first.
	v2 []v2Place
	// why a controller can't be used, by controller.
	why map[string]error
}

// v2Place is a directory of version 2, with the controllers that groups in it can have.
type v2Place struct {
	dir         string
	controllers []string
}

// ErrNoAccess reports that groups can be made on this host, but not by this user.
var ErrNoAccess = errors.New("this user may not make control groups")

// Other reasons why a controller can't be used.
var (
	errNone     = errors.New("no control groups are mounted")
	errReadOnly = errors.New("the control groups are mounted read-only, as in a container")
	errBusy     = errors.New("the control group that this process is in can't be divided")
	errMissing  = errors.New("this kernel, or the group that this process is in, does not have it")
)

// Find looks where this process may make groups. Root stands before every path that is
// read: "/" but in tests. It changes nothing.
func Find(root string) Site {
	s := Site{v1: map[string]string{}, why: map[string]error{}}
	mounts := readMounts(root)
	own := readOwn(root)
	for _, controller := range controllers {
		s.why[controller] = errNone
		for _, m := range mounts {
			switch {
			case m.v2 && errors.Is(s.why[controller], errNone):
				s.why[controller] = errMissing
			case slices.Contains(m.controllers, controller):
				dir := m.dir(root, own[controller])
				if err := writable(dir); err != nil {
					s.why[controller] = err
					continue
				}
				s.v1[controller], s.why[controller] = dir, nil
			}
		}
	}
	for _, m := range mounts {
		if m.v2 {
			s.findV2(m.dir(root, own[""]), filepath.Join(root, m.point))
		}
	}
	return s
}

// findV2 looks for places from dir up to top.
func (s *Site) findV2(dir, top string) {
	for ; ; dir = filepath.Dir(dir) {
		place := v2Place{dir: dir}
		has := fields(filepath.Join(dir, "cgroup.controllers"))
		enabled := fields(filepath.Join(dir, "cgroup.subtree_control"))
		err := errors.Join(writable(dir), writable(filepath.Join(dir, "cgroup.procs")))
		for _, controller := range controllers {
			switch {
			case s.v1[controller] != "" || !slices.Contains(has, controller):
			case err != nil:
				s.blame(controller, err)
			case !slices.Contains(enabled, controller) && isFull(dir):
				s.blame(controller, errBusy)
			default:
				place.controllers = append(place.controllers, controller)
				s.why[controller] = nil
			}
		}
		if len(place.controllers) > 0 {
			s.v2 = append(s.v2, place)
		}
		if dir == top || len(dir) <= len(top) {
			return
		}
	}
}

func (s *Site) blame(controller string, err error) {
	if s.why[controller] != nil {
		s.why[controller] = err
	}
}

// Why says why groups can't bound what a controller controls; nil if they can.
func (s Site) Why(controller string) error {
	if s.why == nil {
		return errNone
	}
	return s.why[controller]
}

// Version names the versions of control groups that are used, as in "cgroup v2"; it is
// empty if none is.
func (s Site) Version() string {
	switch {
	case len(s.v1) > 0 && len(s.v2) > 0:
		return "cgroup v1 and v2"
	case len(s.v2) > 0:
		return "cgroup v2"
	case len(s.v1) > 0:
		return "cgroup v1"
	}
	return ""
}

// isFull reports whether a group of version 2 has processes, so that no controllers can
// be enabled below it. The root group, which has no type, always lets that be.
func isFull(dir string) bool {
	if _, err := os.Stat(filepath.Join(dir, "cgroup.type")); errors.Is(err, fs.ErrNotExist) {
		return false
	}
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return err != nil || len(text) > 0
}

func writable(path string) error {
	switch err := unix.Access(path, unix.W_OK); {
	case err == nil:
		return nil
	case errors.Is(err, unix.EROFS):
		return errReadOnly
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return ErrNoAccess
	default:
		return fmt.Errorf("%s: %w", path, err)
	}
}

func fields(path string) []string {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	return strings.Fields(string(text))
}

// mount is where a hierarchy is mounted.
type mount struct {
	root, point string
	v2          bool
	controllers []string // of version 1
}

// dir returns the directory of a group, as in /proc/self/cgroup.
func (m mount) dir(root, group string) string {
	// In a container the mount may be of a part of the hierarchy only.
	inner, ok := strings.CutPrefix(group, strings.TrimSuffix(m.root, "/"))
	if !ok || (inner != "" && inner[0] != '/') {
		inner = ""
	}
	return filepath.Join(root, m.point, filepath.Clean("/"+inner))
}

// readMounts reads the hierarchies that are mounted; see proc_pid_mountinfo(5).
func readMounts(root string) []mount {
	text, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return nil
	}
	var mounts []mount
	for line := range strings.Lines(string(text)) {
		before, after, found := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !found || len(left) < 5 || len(right) < 3 {
			continue
		}
		m := mount{root: unescape(left[3]), point: unescape(left[4])}
		switch right[0] {
		case "cgroup2":
			m.v2 = true
		case "cgroup":
			m.controllers = strings.Split(right[2], ",")
		default:
			continue
		}
		mounts = append(mounts, m)
	}
	return mounts
}

// unescape undoes how the kernel writes spaces and the like in a path.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

// readOwn reads which groups this process is in, by controller; that of version 2 has no
// name. See cgroups(7).
func readOwn(root string) map[string]string {
	own := map[string]string{}
	text, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return own
	}
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for name := range strings.SplitSeq(parts[1], ",") {
			own[name] = parts[2]
		}
	}
	return own
}
