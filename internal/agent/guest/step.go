package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// kernelDirs are where the kernel's file systems are in the root of a step.
func kernelDirs() []string { return []string{"/proc", "/sys", "/dev"} }

// guestFiles are what a step has of the guest, as containers have it of their host. A step's
// changes to them are no part of a layer.
func guestFiles() []string {
	return []string{"/etc/resolv.conf", "/etc/hosts", "/etc/hostname"}
}

// step runs a command in the root file system of steps. It is the first process of its own
// namespace, so that all that it starts ends with it.
func (o workspaceOrder) step(args []string) error {
	number, err := currentLayer()
	if err != nil {
		return err
	}
	if err := removeStubs(number); err != nil {
		return err
	}
	if err := mountMerged(number); err != nil {
		return err
	}
	sources, err := openSources(o.Step.Mounts)
	if err != nil {
		return err
	}
	if err := mountKernelDirs(); err != nil {
		return err
	}
	if o.Step.NoNetwork {
		if err := upLoopback(); err != nil {
			return err
		}
	}
	stubs, err := os.OpenFile(filepath.Join(layerDir(number), stubsName), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := enter(mergedDir); err != nil {
		return fmt.Errorf("enter the root file system of the step: %w", err)
	}
	mountGuestFiles(sources.guest)
	for i, mount := range o.Step.Mounts {
		if err := sources.mount(i, mount, stubs); err != nil {
			return fmt.Errorf("mount %q: %w", mount.Target, err)
		}
	}
	if err := stubs.Close(); err != nil {
		return err
	}
	return o.become(args)
}

// become takes on the user of a step, and runs its command.
func (o workspaceOrder) become(args []string) error {
	user, err := findUser(o.User)
	if err != nil {
		return err
	}
	env := os.Environ()
	if !hasVariable(env, "HOME") {
		env = append(env, "HOME="+user.home)
	}
	dir := o.Dir
	if dir == "" {
		dir = "/"
	}
	if err := os.Chdir(dir); err != nil {
		return fmt.Errorf("working directory %s: %w", dir, err)
	}
	var groups []int
	if credential := user.credential(); credential != nil {
		for _, gid := range credential.Groups {
			groups = append(groups, int(gid))
		}
	}
	if err := errors.Join(unix.Setgroups(groups), unix.Setgid(int(user.gid)), unix.Setuid(int(user.uid))); err != nil {
		return fmt.Errorf("become user %s: %w", o.User, err)
	}
	return execute(args, env, dir, user)
}

// mountKernelDirs mounts the kernel's file systems in the root of a step.
func mountKernelDirs() error {
	for _, dir := range kernelDirs() {
		inner, err := makeDirIn(mergedDir, dir)
		if err != nil {
			return fmt.Errorf("make %s in the root file system of the step: %w", dir, err)
		}
		target := "/proc/self/fd/" + strconv.Itoa(int(inner.Fd()))
		if dir == "/proc" { // of the step's own processes
			err = unix.Mount("proc", target, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		} else {
			err = unix.Mount(dir, target, "", unix.MS_BIND|unix.MS_REC, "")
		}
		_ = inner.Close()
		if err != nil {
			return fmt.Errorf("mount %s in the root file system of the step: %w", dir, err)
		}
	}
	return nil
}

// stepSources are open files, which a step can be given after it has left the guest's root.
type stepSources struct {
	guest map[string]*os.File
	areas map[int]*os.File // by the number of the mount
}

func openSources(mounts []wire.StepMount) (stepSources, error) {
	sources := stepSources{guest: map[string]*os.File{}, areas: map[int]*os.File{}}
	lower, err := os.Open(filepath.Join(workspaceDir, lowerDir))
	if err != nil {
		return sources, err
	}
	defer func() { _ = lower.Close() }()
	for _, path := range guestFiles() {
		if file, err := openIn(lower, path); err == nil {
			sources.guest[path] = file
		}
	}
	for i, mount := range mounts {
		if mount.Area == "" {
			continue
		}
		dir, err := findArea(mount.Area)
		if err != nil {
			return sources, err
		}
		area, err := os.Open(dir)
		if err != nil {
			return sources, err
		}
		sources.areas[i], err = openIn(area, string(mount.Source))
		_ = area.Close()
		if err != nil {
			return sources, fmt.Errorf("find %q, which is to be mounted at %q: %w", mount.Source, mount.Target, err)
		}
	}
	return sources, nil
}

// openIn opens a path in a directory, whose links lead to places in it, without reading it.
func openIn(dir *os.File, path string) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(int(dir.Fd()), "./"+path, &how)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// makeDirIn opens a directory in a root, whose links lead to places in it, and makes it and
// those above it if they are not there.
func makeDirIn(root, path string) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	path = strings.TrimPrefix(filepath.Clean("/"+path), "/")
	above := "."
	for part := range strings.SplitSeq(path, "/") {
		inner := filepath.Join(above, part)
		if err := makeOneIn(dir, above, part); err != nil {
			return nil, err
		}
		above = inner
	}
	return openIn(dir, path)
}

// makeOneIn makes a directory in one of a root, if nothing is there.
func makeOneIn(root *os.File, above, name string) error {
	inner, err := openIn(root, filepath.Join(above, name))
	if err == nil {
		return inner.Close()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent, err := openIn(root, above)
	if err != nil {
		return err
	}
	defer func() { _ = parent.Close() }()
	return unix.Mkdirat(int(parent.Fd()), name, 0o755)
}

// mountGuestFiles puts the guest's files where the root file system of a step has them too.
func mountGuestFiles(files map[string]*os.File) {
	for path, file := range files {
		// Where there is none, the guest's is seen in the lowest layer unless a step removed it.
		_ = unix.Mount("/proc/self/fd/"+strconv.Itoa(int(file.Fd())), path, "", unix.MS_BIND, "")
		_ = file.Close()
	}
}

// mount makes one of the mounts of a step. What is made for it is noted.
func (s stepSources) mount(i int, mount wire.StepMount, stubs *os.File) error {
	target := filepath.Join("/", string(mount.Target))
	source := s.areas[i]
	if source == nil {
		if err := makeTarget(target, true, stubs); err != nil {
			return err
		}
		data := "mode=1777"
		if mount.Size > 0 {
			data += ",size=" + strconv.FormatInt(mount.Size, 10)
		}
		return unix.Mount("tmpfs", target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, data)
	}
	defer func() { _ = source.Close() }()
	var stat unix.Stat_t
	if err := unix.Fstat(int(source.Fd()), &stat); err != nil {
		return err
	}
	if err := makeTarget(target, stat.Mode&unix.S_IFMT == unix.S_IFDIR, stubs); err != nil {
		return err
	}
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(int(source.Fd())), target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if !mount.ReadOnly {
		return nil
	}
	return unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}

// makeTarget makes what is mounted on, a directory or a file, if it is not there, and notes the
// paths of what it made.
func makeTarget(target string, isDir bool, stubs *os.File) error {
	if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if parent := filepath.Dir(target); parent != target {
		if err := makeTarget(parent, true, stubs); err != nil {
			return err
		}
	}
	if _, err := stubs.WriteString(target + "\x00"); err != nil {
		return err
	}
	if isDir {
		return os.Mkdir(target, 0o755)
	}
	file, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return file.Close()
}

// removeStubs removes what was made in a layer for mounts and is empty still.
func removeStubs(number int) error {
	list := filepath.Join(layerDir(number), stubsName)
	text, err := os.ReadFile(list)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	upper, err := os.OpenRoot(filepath.Join(layerDir(number), upperName))
	if err != nil {
		return err
	}
	defer func() { _ = upper.Close() }()
	paths := strings.Split(string(text), "\x00")
	for _, stub := range slices.Backward(paths) { // what is in a directory was made after it
		path := strings.TrimPrefix(stub, "/")
		info, err := upper.Lstat(path)
		if path == "" || err != nil || info.Mode().IsRegular() && info.Size() > 0 {
			continue
		}
		if info.IsDir() || info.Mode().IsRegular() {
			_ = upper.Remove(path) // fails for a directory that has something in it
		}
	}
	return os.Remove(list)
}

// upLoopback takes the loopback interface of a network namespace of its own into use.
func upLoopback() error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(socket) }()
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("take the loopback interface into use: %w", err)
	}
	return nil
}
