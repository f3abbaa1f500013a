package launcher

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/namespace"
)

// mount mounts what is ordered, in this mount namespace only.
func (l *launch) mount() error {
	if len(l.Mounts) == 0 {
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to this namespace: %w", err)
	}
	if l.Supervised {
		// The one that is there calls processes by their numbers outside of the PID namespace.
		if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("mount /proc: %w", err)
		}
	}
	users := userNamespaces{}
	defer users.close()
	for _, m := range l.Mounts {
		if err := mountOne(m, users); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.Source, m.Target, err)
		}
	}
	return nil
}

func mountOne(m namespace.Mount, users userNamespaces) error {
	err := mountTree(m, users)
	if err == nil || !isOld(err) {
		return err
	}
	if m.User != 0 {
		if letErr := letUser(m); letErr != nil {
			return fmt.Errorf("show its owner as user %d: %w; without that, %w", m.User, err, letErr)
		}
	}
	return mountPlain(m)
}

// isOld reports whether an error may be that of a kernel, or of a file system, which does not
// have what is asked for.
func isOld(err error) bool {
	return errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM)
}

// mountTree mounts all at once, with another owner if that is ordered.
func mountTree(m namespace.Mount, users userNamespaces) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("open_tree", err)
	}
	defer func() { _ = unix.Close(tree) }()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID}
	if m.Devices {
		attr.Attr_clr = unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	} else {
		attr.Attr_set |= unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	}
	if m.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if m.User != 0 {
		mapped, err := users.mapping(tree, m.User)
		if err != nil {
			return err
		}
		attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
		attr.Userns_fd = uint64(mapped)
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return os.NewSyscallError("mount_setattr", err)
	}
	return os.NewSyscallError("move_mount", unix.MoveMount(tree, "", unix.AT_FDCWD, m.Target, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// mountPlain mounts as every kernel can.
func mountPlain(m namespace.Mount) error {
	if err := unix.Mount(m.Source, m.Target, "", unix.MS_BIND, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	flags := uintptr(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_NOSUID)
	if !m.Devices {
		flags |= unix.MS_NODEV | unix.MS_NOEXEC
	}
	if m.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	return os.NewSyscallError("remount", unix.Mount("", m.Target, "", flags, ""))
}

// letUser lets a user use a file whose owner can't be shown as that user. Its owner keeps what
// rights it has. A file that is only read may be others' too, so it is not touched.
func letUser(m namespace.Mount) error {
	info, err := os.Stat(m.Source)
	if err != nil {
		return err
	}
	if m.ReadOnly {
		const readable = 0o004
		if info.Mode()&readable == 0 {
			return fmt.Errorf("it must be readable by everybody (`chmod o+r %s`; its directory may still let nobody in)", m.Source)
		}
		return nil
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); !ok || int(owner.Uid) != os.Geteuid() {
		return fmt.Errorf("it must be user %d's own", os.Geteuid())
	}
	if err := os.Chown(m.Source, -1, m.User); err != nil {
		return err
	}
	const shared = 0o060
	return os.Chmod(m.Source, info.Mode().Perm()|shared)
}

// mapping is which user and group of a file system appear to be another user and group.
type mapping struct{ uid, gid, as int }

// userNamespaces are those that have been made to map users, by what they map: they are the
// form in which the kernel is told.
type userNamespaces map[mapping]*os.File

// mapping returns the descriptor of a user namespace in which the owner of a file is a user.
func (u userNamespaces) mapping(file, as int) (int, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(file, &stat); err != nil {
		return -1, os.NewSyscallError("fstat", err)
	}
	wanted := mapping{uid: int(stat.Uid), gid: int(stat.Gid), as: as}
	if u[wanted] == nil {
		made, err := newUserNamespace(wanted)
		if err != nil {
			return -1, fmt.Errorf("map its owner: %w", err)
		}
		u[wanted] = made
	}
	return int(u[wanted].Fd()), nil
}

func (u userNamespaces) close() {
	for _, file := range u {
		_ = file.Close()
	}
}

// newUserNamespace returns a file of a new user namespace. A namespace is that of a process
// first: of one that is stopped before its first instruction, and killed.
func newUserNamespace(m mapping) (_ *os.File, err error) {
	cmd := exec.Command("/proc/self/exe") //nolint:noctx // it does not run
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: m.uid, HostID: m.as, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: m.gid, HostID: m.as, Size: 1}},
		Ptrace:      true,
		Pdeathsig:   unix.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() {
		killed := cmd.Process.Kill()
		_ = cmd.Wait() // the status is that of a process that was killed
		err = errors.Join(err, killed)
	}()
	return os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
}
