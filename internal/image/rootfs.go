package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/apt"
	"github.com/smolvm/smolvm/internal/image/ext4fs"
)

// rootfsSize is the size of a root file system that is made here, in bytes. It is
// sparse: what is not used takes no space, in the image or in VMs' disks.
const rootfsSize = 8 << 30

// userID is the id of the default image's user and of its group.
const userID = 1000

// baseFiles returns the files of the default image beside busybox.
func baseFiles() map[string]string {
	return map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n" +
			"nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n" +
			"user:x:1000:1000:user:/home/user:/bin/sh\n",
		"etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\nuser:x:1000:\n",
		// Nobody can log in by a password.
		"etc/shadow": "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\nuser:*:19000:0:99999:7:::\n",
		// The agent writes those of the network here.
		"etc/resolv.conf":   "",
		"etc/hosts":         "127.0.0.1\tlocalhost\n::1\tlocalhost\n",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
		"etc/profile":       "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PS1='\\u@\\h:\\w\\$ '\n",
		"etc/shells":        "/bin/sh\n/bin/ash\n",
		"etc/os-release":    "NAME=\"smolvm base\"\nID=smolvm\nPRETTY_NAME=\"smolvm base (busybox)\"\n",
		// For an image that is booted with init=/sbin/init.
		"etc/inittab": "::sysinit:/bin/mount -a\n::ctrlaltdel:/sbin/reboot\n::shutdown:/bin/umount -a -r\n",
		"etc/fstab":   "proc /proc proc defaults 0 0\nsysfs /sys sysfs defaults 0 0\ndevpts /dev/pts devpts gid=5,mode=620 0 0\ntmpfs /run tmpfs mode=755 0 0\n",
	}
}

// baseDirs returns the directories of the default image, with their modes. Each comes after
// the one it is in.
func baseDirs() []struct {
	name string
	mode fs.FileMode
} {
	return []struct {
		name string
		mode fs.FileMode
	}{
		{".", 0o755}, {"bin", 0o755}, {"dev", 0o755}, {"etc", 0o755}, {"home", 0o755}, {"home/user", 0o755},
		{"lib", 0o755}, {"mnt", 0o755}, {"opt", 0o755}, {"proc", 0o555}, {"root", 0o700}, {"run", 0o755},
		{"sbin", 0o755}, {"sys", 0o555}, {"tmp", fs.ModeSticky | 0o777},
		{"usr", 0o755}, {"usr/bin", 0o755}, {"usr/sbin", 0o755}, {"usr/local", 0o755}, {"usr/local/bin", 0o755},
		{"var", 0o755}, {"var/log", 0o755}, {"var/tmp", fs.ModeSticky | 0o777},
	}
}

// makeBaseTree lays the default image's files out below dir.
func makeBaseTree(ctx context.Context, dir, busybox string) error {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	// Modes are set by chmod, whatever the umask is; those of directories last, as
	// their owner may not be allowed to write to them.
	for _, d := range baseDirs() {
		if err := os.MkdirAll(filepath.Join(dir, d.name), 0o700); err != nil {
			return err
		}
	}
	write := func(name string, mode fs.FileMode, content []byte) error {
		path := filepath.Join(dir, name)
		return errors.Join(os.WriteFile(path, content, mode), os.Chmod(path, mode))
	}
	for name, text := range baseFiles() {
		mode := fs.FileMode(0o644)
		if name == "etc/shadow" {
			mode = 0o600
		}
		if err := write(name, mode, []byte(text)); err != nil {
			return err
		}
	}
	// A process that is forked meanwhile, for whatever else this program does, would
	// hold the file open for writing, and the kernel runs no such file.
	syscall.ForkLock.RLock()
	err = write("bin/busybox", 0o755, program)
	syscall.ForkLock.RUnlock()
	if err != nil {
		return err
	}
	if err := linkApplets(ctx, dir); err != nil {
		return err
	}
	for _, d := range baseDirs() {
		if err := os.Chmod(filepath.Join(dir, d.name), d.mode); err != nil {
			return err
		}
	}
	return nil
}

// linkApplets makes all that busybox can do a command.
func linkApplets(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "bin/busybox"), "--list-full")
	applets, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("ask busybox what it can do: %w", err)
	}
	for applet := range strings.FieldsSeq(string(applets)) {
		if !filepath.IsLocal(applet) || applet == "bin/busybox" {
			continue
		}
		// Of a directory that is not in baseDirs, nothing is wanted.
		err := os.Symlink("/bin/busybox", filepath.Join(dir, applet))
		if err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// ext4 is a file system to be made.
type ext4 struct {
	path, tree string
	size       int64 // in bytes
	files      int64 // in the tree, directories too
	// owners says whose files of the tree are, by user id, which is the group's as
	// well. All others are whose they are in the tree, or root's if only root can have
	// files of others.
	owners map[string]int
	// seed is where identifiers come from: hexadecimal digits, at least 64.
	seed string
}

// ext4Features are what mke2fs 1.46 and 1.47 both know. They are given here, as each
// distribution has its own in /etc/mke2fs.conf, and some of them are too new for
// kernels that are still in use. 64bit and resize_inode let the guest grow the file
// system while it is mounted.
const ext4Features = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super," +
	"large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

const (
	// smallStep is what the size of a small root file system is a multiple of, and
	// maxSmallSize the largest that is made: it takes that of the disk once more.
	smallStep    = 64 << 20
	maxSmallSize = 512 << 20
	// journalSize is in MiB. A smaller journal would not let the file system grow while it
	// is mounted: one step of that may fill a quarter of it.
	journalSize = 32
)

// A file system has an inode for so many bytes, as is usual, but at least a quarter more
// than its tree needs, and some to start with.
const (
	bytesPerInode = 16384
	inodeSize     = 256
	spareInodes   = 64
)

// measure tells how much space a tree takes in a file system, in bytes, with the inodes
// of its files; and how many files there are.
func measure(dir string) (bytes, files int64, err error) {
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var stat unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &stat)
		}
		bytes += stat.Blocks*512 + inodeSize
		files++
		return err
	})
	return bytes, files, err
}

// smallSize returns the size of a file system for a tree that takes so much, in bytes: with
// its journal, its tables, and some room to start with.
func smallSize(tree int64) int64 {
	return (tree*5/4 + journalSize<<20 + smallStep + smallStep - 1) / smallStep * smallStep
}

// makeExt4 makes a sparse file system that holds a tree.
func makeExt4(ctx context.Context, e ext4) error {
	if err := e.format(ctx); err != nil {
		return err
	}
	file, err := os.OpenFile(e.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(ext4fs.Fill(ctx, file, e.tree, ext4fs.Options{Owner: e.owner}), file.Close())
}

// format makes a sparse file system that is empty.
func (e ext4) format(ctx context.Context) error {
	// Of a file that is there and empty, mke2fs knows that it reads as zeros: then it
	// writes none, and tells the guest's kernel to write none either.
	file, err := os.Create(e.path)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Truncate(e.size), file.Close()); err != nil {
		return err
	}
	inodes := max(e.size/bytesPerInode, e.files*5/4+spareInodes)
	return runTool(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-O", ext4Features, "-b", "4096",
		"-I", fmt.Sprint(inodeSize), "-N", fmt.Sprint(inodes),
		"-m", "0", "-J", fmt.Sprintf("size=%d", journalSize), "-U", uuid(e.seed[:32]),
		"-E", "root_owner=0:0,discard,lazy_journal_init=1,hash_seed="+uuid(e.seed[32:64]), e.path)
}

// owner returns whose a file is to be.
func (e ext4) owner(name string, stat *unix.Stat_t) (uid, gid uint32) {
	if id, ok := e.owners[name]; ok {
		return uint32(id), uint32(id)
	}
	if os.Getuid() != 0 {
		return 0, 0 // only root can have files of others
	}
	return stat.Uid, stat.Gid
}

// uuid writes 32 hexadecimal digits as mke2fs takes them.
func uuid(hex string) string {
	return strings.Join([]string{hex[:8], hex[8:12], hex[12:16], hex[16:20], hex[20:]}, "-")
}

// runTool runs a program of e2fsprogs, which Debian keeps out of users' PATH.
func runTool(ctx context.Context, name string, args ...string) error {
	path, err := findTool(name)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, apt.LastWords(errs.String()))
	}
	return nil
}

func findTool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", &smolvm.Error{Hint: "`smolvm doctor` says how to install it", Err: fmt.Errorf("%s is missing: install e2fsprogs", name)}
}
