package namespace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
)

// errNoLauncher reports that the launcher's program has not become one.
var errNoLauncher = errors.New("the program that is to start it is no launcher")

// Check returns what keeps [Start] from giving a command a network, nil if nothing does. It
// makes one, and leaves nothing behind; that takes milliseconds. The program is as
// [Options.Program]. The error's hint says what a person can do.
func Check(ctx context.Context, program []string) error {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	link := os.NewFile(uintptr(ends[0]), "link")
	defer func() { _, _ = link.Close(), unix.Close(ends[1]) }()
	opts := Options{Program: program, Network: &Network{Link: link}}
	p, err := start(ctx, &exec.Cmd{}, func(fork func() error) error { return fork() }, opts)
	if err != nil {
		return explain(err, "", opts)
	}
	<-p.Done()
	return nil
}

// The settings of the kernel that forbid user namespaces; see the kernel's
// Documentation/admin-guide/sysctl, user_namespaces(7), and Ubuntu's and Debian's patches.
const (
	maxUserNamespaces = "user.max_user_namespaces"
	maxNetNamespaces  = "user.max_net_namespaces"
	debianClone       = "kernel.unprivileged_userns_clone"
	appArmorRestricts = "kernel.apparmor_restrict_unprivileged_userns"
)

// explain returns the error of a start for a person. Path is the command, empty if there is
// none.
func explain(err error, path string, opts Options) error {
	what := "give a program a network of its own"
	if path != "" {
		what = fmt.Sprintf("start %s in a namespace of its own", path)
	}
	if opts.Network == nil && path != "" {
		what = "start " + path
	}
	hint := ""
	if errors.Is(err, errNoLauncher) {
		hint = "a program that runs VMs must call shim.Main (package github.com/smolvm/smolvm/shim) first in its main"
	}
	failed, ok := errors.AsType[*failure](err)
	if ok {
		var why error
		if hint, why = explainStep(failed, host{read: os.ReadFile, unprivileged: !privileged()}); why != nil {
			err = fmt.Errorf("%s: %w: %w", failed.Step, why, failed.Errno)
		}
	}
	err = fmt.Errorf("%s: %w", what, err)
	if hint != "" {
		return &smolvm.Error{Hint: hint, Err: err}
	}
	return err
}

// host is what an explanation depends on beside the error.
type host struct {
	read         func(path string) ([]byte, error)
	unprivileged bool // a user namespace is needed
}

// setting returns the value of a setting of the kernel, by its name for sysctl(8).
func (h host) setting(name string) (int, bool) {
	text, err := h.read("/proc/sys/" + string(bytes.ReplaceAll([]byte(name), []byte("."), []byte("/"))))
	if err != nil {
		return 0, false
	}
	value, err := strconv.Atoi(string(bytes.TrimSpace(text)))
	return value, err == nil
}

// is reports whether a setting is there and has a value.
func (h host) is(name string, value int) bool {
	got, ok := h.setting(name)
	return ok && got == value
}

// Ways out that several causes have.
const (
	orRoot   = "; or run smolvm as root"
	rootHint = "run smolvm as root"
)

// explainStep returns why a step has failed, nil if the failure says it itself, and what to do
// about it.
func explainStep(f *failure, h host) (hint string, why error) {
	denied := f.Errno == unix.EPERM || f.Errno == unix.EACCES
	switch {
	case f.Step == stepClone && errors.Is(f.Errno, fs.ErrNotExist): // the launcher's program
		return "", nil
	// Rights that a user namespace should have given, unlike EACCES, which is a file's.
	case f.Step == stepClone || h.unprivileged && f.Errno == unix.EPERM && f.Step != StepExecute:
		if hint, why = explainClone(f, h); why != nil || f.Step == stepClone {
			return hint, why
		}
	}
	return explainDevice(f, denied)
}

// explainClone returns why namespaces can't be made.
func explainClone(f *failure, h host) (hint string, why error) {
	if !h.unprivileged {
		if f.Errno == unix.ENOSPC && h.is(maxNetNamespaces, 0) {
			return "allow them by `sysctl -w " + maxNetNamespaces + "=1000`", errors.New("network namespaces are forbidden on this host")
		}
		return "", nil
	}
	const forbidden = "user namespaces are forbidden on this host"
	set := func(name string, value int) string {
		return fmt.Sprintf("allow them by `sysctl -w %s=%d`, by root (and in a file in /etc/sysctl.d, or it is gone with the next boot)", name, value) + orRoot
	}
	switch {
	case h.is(debianClone, 0):
		return set(debianClone, 1), fmt.Errorf("%s (%s is 0)", forbidden, debianClone)
	case h.is(maxUserNamespaces, 0):
		return set(maxUserNamespaces, 10000), fmt.Errorf("%s (%s is 0)", forbidden, maxUserNamespaces)
	case h.is(maxNetNamespaces, 0):
		return set(maxNetNamespaces, 10000), fmt.Errorf("network namespaces are forbidden on this host (%s is 0)", maxNetNamespaces)
	case h.is(appArmorRestricts, 1):
		return "give the smolvm program a profile that has `userns,` (see /etc/apparmor.d for others'), or " + set(appArmorRestricts, 0),
			fmt.Errorf("AppArmor forbids user namespaces to programs without a profile (%s is 1)", appArmorRestricts)
	case f.Step != stepClone:
		return "", nil
	case f.Errno == unix.ENOSPC || f.Errno == unix.EUSERS:
		return "raise `sysctl user.max_user_namespaces`, and what else it has of max_*_namespaces" + orRoot, errors.New("there are as many namespaces as are allowed")
	case f.Errno == unix.EINVAL || f.Errno == unix.ENOSYS:
		return rootHint, errors.New("this kernel has no user namespaces")
	case f.Errno == unix.EPERM || f.Errno == unix.EACCES:
		return "in a container, or in a chroot, that takes a permission of whoever runs it (for Docker: `--security-opt seccomp=unconfined`)" + orRoot,
			errors.New("this process may not make user namespaces")
	}
	return "", nil
}

// explainDevice returns what an interface or a bridge lacks.
func explainDevice(f *failure, denied bool) (hint string, why error) {
	missing := f.Errno == unix.ENOENT || f.Errno == unix.ENODEV || f.Errno == unix.ENXIO
	switch {
	case f.Step == StepInterface && missing:
		return "`modprobe tun`, by root, loads the kernel's module for TAP interfaces; in a container, start it with `--device /dev/net/tun`", errors.New("/dev/net/tun is not there")
	case f.Step == StepInterface && denied:
		return "`chmod 0666 /dev/net/tun`, by root, is what most distributions have, as it gives no right to any interface of the host", errors.New("/dev/net/tun may not be used by this user")
	case f.Step == StepBridge && (f.Errno == unix.EOPNOTSUPP || missing):
		return "`modprobe bridge`, by root, loads the kernel's module for them", errors.New("this kernel has no bridges")
	}
	return "", nil
}
