// Package jail runs Firecracker in the chroot of its jailer, as a user of its own.
//
// The jailer is Firecracker's own program for that; see its docs/jailer.md. It needs root, makes
// a directory with a copy of Firecracker and the devices that it uses, moves into it, changes
// its user and executes Firecracker. Beside that:
//
//   - The files of the VM are mounted in the directory, in a mount namespace that only the
//     jailer has. So nothing is mounted on the host that somebody would have to unmount, and
//     what is removed there is never a file of the VM's. A hard link would need one file system
//     and the change of its owner, and the jailer closes descriptors.
//   - A block device has a second device file in the directory.
//   - Each mount shows its file's owner as the jail's user. So no file changes its owner, and
//     none has to be readable by everybody; what several VMs share each user sees as its own,
//     and can't write to. Where the kernel can't do that (before 5.12, and on some file
//     systems), a file that is written to is given the jail's group, and one that is only read
//     must be readable by everybody.
//   - Firecracker is in a PID namespace whose first process is ours: it dies with the shim,
//     though the change of its user has rid it of its parent-death signal. The jailer's own
//     --new-pid-ns would make Firecracker an orphan that outlives the shim.
//   - What Firecracker makes (its sockets, what a guest is saved to) is in the directory on the
//     host too, and can be renamed from there.
//   - Firecracker is where it was started: in the control group and the network namespace of
//     the jailer, which is told to make none.
package jail

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/namespace"
)

// Config is what a jail is made of.
type Config struct {
	// Jailer and Firecracker are the paths of the programs, both of the same release.
	Jailer, Firecracker string
	// Dir is the jail's directory, which is not there yet, on a file system to which what
	// Firecracker saves can be renamed from.
	Dir string
	// ID is Firecracker's: at most 64 letters, digits, and hyphens.
	ID string
	// User is the id of the user and group that Firecracker runs as; see [Users].
	User int
	// Files are the VM's, by the names that Firecracker uses.
	Files []File
}

// File is a regular file, or a block device, of the host that a jail has.
type File struct {
	// Name is the file's in the jail, without a directory.
	Name string
	// Path is where it is on the host.
	Path string
	// Writable allows Firecracker to write to it.
	Writable bool
}

// Jail is a directory that is ready for a jailer.
type Jail struct {
	config  Config
	root    string
	mounted []File // those of the files that are mounted
}

// maxFiles is how many files Firecracker may have open: it needs some 20, and one for each
// device.
const maxFiles = 1024

// maxID is the length of the longest id that Firecracker takes.
const maxID = 64

// New makes a jail's directory. It is removed by [Remove], also if New fails.
func New(config Config) (*Jail, error) {
	program, err := config.check()
	if err != nil {
		return nil, fmt.Errorf("make a jail for Firecracker: %w", err)
	}
	j := &Jail{config: config, root: filepath.Join(config.Dir, filepath.Base(program), config.ID, "root")}
	j.config.Firecracker = program
	if err := j.make(); err != nil {
		return nil, fmt.Errorf("make a jail for Firecracker: %w", err)
	}
	return j, nil
}

// check returns what is wrong with a configuration; if nothing is, Firecracker's program, whose
// name the jailer calls its directory by.
func (c Config) check() (program string, err error) {
	if os.Geteuid() != 0 {
		return "", &smolvm.Error{Hint: "without root, Firecracker is in namespaces of its own, and needs no jailer",
			Err: fmt.Errorf("%w: the jailer needs root", smolvm.ErrUnsupported)}
	}
	if c.ID == "" || len(c.ID) > maxID || strings.Trim(c.ID, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") != "" {
		return "", fmt.Errorf("%q is no id for the jailer, which has at most %d letters, digits and hyphens", c.ID, maxID)
	}
	if c.User <= 0 {
		return "", fmt.Errorf("user %d is none to run Firecracker as", c.User)
	}
	if !filepath.IsAbs(c.Dir) {
		return "", fmt.Errorf("its directory %q is not absolute", c.Dir)
	}
	if program, err = filepath.EvalSymlinks(c.Firecracker); err != nil {
		return "", err
	}
	if program, err = filepath.Abs(program); err != nil {
		return "", err
	}
	taken := map[string]bool{".": true, "..": true}
	for _, name := range c.reserved(program) {
		taken[name] = true
	}
	for _, file := range c.Files {
		if taken[file.Name] || file.Name == "" || strings.ContainsRune(file.Name, '/') {
			return "", fmt.Errorf("%q is no name for a file in a jail, or one that is taken", file.Name)
		}
		taken[file.Name] = true
		if !filepath.IsAbs(file.Path) {
			return "", fmt.Errorf("file %s: %q is not absolute", file.Name, file.Path)
		}
	}
	return program, nil
}

// reserved are the names that the jailer uses itself.
func (Config) reserved(program string) []string {
	name := filepath.Base(program)
	return []string{"dev", "run", "sys", "old_root", name, name + ".pid"}
}

// make makes the directory, and in it a place for each file to be mounted on.
func (j *Jail) make() error {
	if err := os.Mkdir(j.config.Dir, 0o700); err != nil {
		return err
	}
	if err := os.MkdirAll(j.root, 0o700); err != nil {
		return err
	}
	for _, file := range j.config.Files {
		info, err := os.Stat(file.Path)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() && !isBlockDevice(info) {
			return fmt.Errorf("file %s: %s is neither a regular file nor a block device", file.Name, file.Path)
		}
		path := filepath.Join(j.root, file.Name)
		if isBlockDevice(info) {
			err = j.makeDevice(path, info, file.Writable)
		} else {
			err = os.WriteFile(path, nil, 0o600)
			j.mounted = append(j.mounted, file)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// makeDevice makes another device file of a block device. That of the host keeps its owner; this
// one is root's, so that Firecracker can't give itself a right to it.
func (j *Jail) makeDevice(path string, of fs.FileInfo, writable bool) error {
	stat, ok := of.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("device %s: its number is not known", path)
	}
	mode := os.FileMode(0o040)
	if writable {
		mode = 0o060
	}
	if err := unix.Mknod(path, unix.S_IFBLK, int(stat.Rdev)); err != nil {
		return &fs.PathError{Op: "mknod", Path: path, Err: err}
	}
	if err := os.Lchown(path, 0, j.config.User); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

func isBlockDevice(info fs.FileInfo) bool {
	return info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0
}

// Root returns the directory that is "/" to Firecracker, and its working directory. The files
// of the configuration are seen there by Firecracker only.
func (j *Jail) Root() string { return j.root }

// User returns the id of the user that Firecracker runs as.
func (j *Jail) User() int { return j.config.User }

// Start starts Firecracker in the jail by a command: its arguments, but for "--id", which the
// jailer adds, and its streams. Network, if not nil, is Firecracker's, whose user owns the TAP.
// The rest is as in [namespace.Start].
func (j *Jail) Start(ctx context.Context, cmd *exec.Cmd, within func(fork func() error) error, program []string, network *namespace.Network) (*namespace.Process, error) {
	if network != nil {
		own := *network
		own.Owner = &j.config.User
		network = &own
	}
	return namespace.Start(ctx, j.command(cmd), within, namespace.Options{
		Program: program, Network: network, Mounts: j.mounts(), Supervised: true, Capabilities: needed(),
	})
}

// command returns the jailer's.
func (j *Jail) command(of *exec.Cmd) *exec.Cmd {
	user := strconv.Itoa(j.config.User)
	args := []string{
		"--id", j.config.ID, "--exec-file", j.config.Firecracker, "--uid", user, "--gid", user,
		"--chroot-base-dir", j.config.Dir,
		// The jailer's own choice is more than who limits Firecracker may allow.
		"--resource-limit", "no-file=" + strconv.Itoa(maxFiles), "--",
	}
	if len(of.Args) > 1 {
		args = append(args, of.Args[1:]...)
	}
	cmd := exec.Command(j.config.Jailer, args...) //nolint:noctx // it becomes Firecracker, which outlives the call
	cmd.Stdin, cmd.Stdout, cmd.Stderr = of.Stdin, of.Stdout, of.Stderr
	cmd.SysProcAttr = of.SysProcAttr
	return cmd
}

// mounts returns what is mounted for the jailer, which takes all that is below its directory
// along. The directory is mounted on itself, as a file system of data may forbid devices and
// programs.
func (j *Jail) mounts() []namespace.Mount {
	mounts := []namespace.Mount{{Source: j.config.Dir, Target: j.config.Dir, Devices: true}}
	for _, file := range j.mounted {
		mounts = append(mounts, namespace.Mount{
			Source: file.Path, Target: filepath.Join(j.root, file.Name),
			ReadOnly: !file.Writable, User: j.config.User,
		})
	}
	return mounts
}

// needed returns the capabilities that the jailer needs. Firecracker gets none of them, as it is
// executed by a user who is not root.
func needed() []uintptr {
	return []uintptr{
		unix.CAP_SYS_ADMIN, unix.CAP_MKNOD, unix.CAP_SETUID, unix.CAP_SETGID, // mounts, devices, users
		unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, // the jail's directories, which are then the user's
	}
}

// Remove removes a jail's directory, of this or an earlier process, once its Firecracker has
// ended. One that is not there is a success. It refuses what may not be a jail.
func Remove(dir string) error {
	if err := remove(dir); err != nil {
		return fmt.Errorf("remove the jail %s: %w", dir, err)
	}
	return nil
}

func remove(dir string) error {
	if !filepath.IsAbs(dir) {
		return errors.New("the path is not absolute")
	}
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return errors.New("it is no directory")
	}
	// A jail has mounts in its own namespace only. What is mounted there on the host is
	// somebody's file system.
	below, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	if len(below) > 0 {
		return fmt.Errorf("something is mounted there: %s", strings.Join(below, ", "))
	}
	return os.RemoveAll(dir)
}

// mountsBelow returns where something is mounted on a directory or below it.
func mountsBelow(dir string) ([]string, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var below []string
	// Octal escapes; see proc_pid_mountinfo(5).
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(string(text)) {
		const pointField = 4
		fields := strings.Fields(line)
		if len(fields) <= pointField {
			return nil, fmt.Errorf("unexpected text %q", line)
		}
		if point := unescape.Replace(fields[pointField]); point == dir || strings.HasPrefix(point, dir+"/") {
			below = append(below, point)
		}
	}
	return below, nil
}
