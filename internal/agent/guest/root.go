package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newRoot is where the root disk is mounted before it becomes the root.
const newRoot = "/newroot"

// mount is one file system to mount.
type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) { // EBUSY: the kernel has done it
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

func mountBasics() error {
	return mountAll([]mount{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	})
}

// mountRest mounts what programs expect. An image's own init does that itself.
func mountRest() error {
	err := mountAll([]mount{
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	})
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if linkErr := os.Symlink(target, link); linkErr != nil && !os.IsExist(linkErr) {
			err = errors.Join(err, linkErr)
		}
	}
	return err
}

// switchRoot mounts the disk that the kernel's arguments name and makes it the
// root. Without a root= the initramfs stays.
func switchRoot(options map[string]string, events *uevents) error {
	device := options["root"]
	if device == "" {
		return mountRest()
	}
	if !strings.HasPrefix(device, "/dev/") {
		return fmt.Errorf("root=%s: only devices below /dev are known", device)
	}
	if err := events.until(func() (bool, error) {
		_, err := os.Stat(device)
		return err == nil, nil
	}); err != nil {
		return fmt.Errorf("wait for root device %s: %w", device, err)
	}
	if err := mountRoot(device, options); err != nil {
		return err
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := os.MkdirAll(newRoot+dir, 0o755); err != nil {
			return fmt.Errorf("prepare root file system: %w", err)
		}
		if err := unix.Mount(dir, newRoot+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	freeInitramfs()
	if err := enter(newRoot); err != nil {
		return fmt.Errorf("enter root file system: %w", err)
	}
	if options["init"] != "" {
		return nil
	}
	return mountRest()
}

func enter(dir string) error {
	if err := os.Chdir(dir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// freeInitramfs deletes the initramfs's files, which are memory. It stays on its
// own file system; the disk is another.
func freeInitramfs() {
	entries, err := os.ReadDir("/")
	if err != nil {
		return
	}
	for _, entry := range entries {
		switch path := "/" + entry.Name(); path {
		case newRoot, "/proc", "/sys", "/dev":
		default:
			_ = os.RemoveAll(path)
		}
	}
}

// mountRoot mounts the root disk by whichever file system it holds.
func mountRoot(device string, options map[string]string) error {
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	var flags uintptr
	if _, readOnly := options["ro"]; readOnly {
		flags = unix.MS_RDONLY
	}
	kinds, err := fileSystems(options["rootfstype"])
	if err != nil {
		return err
	}
	var errs []error
	for _, kind := range kinds {
		data := options["rootflags"]
		if kind == "ext4" && data == "" {
			// Inode tables that nobody has used need no zeroing, which would cost
			// time now and space in the disk's overlay.
			data = "noinit_itable"
		}
		err := unix.Mount(device, newRoot, kind, flags, data)
		if err == nil {
			if kind == "ext4" && flags&unix.MS_RDONLY == 0 {
				return growExt4(device)
			}
			return nil
		}
		errs = append(errs, fmt.Errorf("as %s: %w", kind, err))
	}
	return fmt.Errorf("mount root file system %s: %w", device, errors.Join(errs...))
}

// fileSystems lists what to try: what the caller says, or what the kernel knows.
func fileSystems(asked string) ([]string, error) {
	if asked != "" {
		return strings.Split(asked, ","), nil
	}
	text, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return nil, err
	}
	kinds := []string{"ext4"}
	for line := range strings.Lines(string(text)) {
		// Those that need a device have nothing before the tab.
		kind, found := strings.CutPrefix(strings.TrimRight(line, "\n"), "\t")
		if found && kind != "ext4" {
			kinds = append(kinds, kind)
		}
	}
	return kinds, nil
}

// ext4ResizeFS is EXT4_IOC_RESIZE_FS of the kernel's fs/ext4/ext4.h.
const ext4ResizeFS = 0x40086610

// growExt4 makes the mounted file system as large as its disk.
func growExt4(device string) error {
	disk, err := os.Open(device)
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }()
	end, err := disk.Seek(0, 2)
	if err != nil {
		return fmt.Errorf("size of %s: %w", device, err)
	}
	// See the kernel's Documentation/filesystems/ext4/super.rst for the layout.
	super := make([]byte, 1024)
	if _, err := disk.ReadAt(super, 1024); err != nil {
		return fmt.Errorf("read superblock of %s: %w", device, err)
	}
	blockSize := int64(1024) << (binary.LittleEndian.Uint32(super[0x18:]) & 0xf)
	blocks := int64(binary.LittleEndian.Uint32(super[0x04:])) | int64(binary.LittleEndian.Uint32(super[0x150:]))<<32
	want := uint64(end / blockSize)
	if end/blockSize <= blocks {
		return nil
	}
	root, err := os.Open(newRoot)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&want))); errno != 0 {
		return fmt.Errorf("grow root file system to %d MiB: %w", end>>20, errno)
	}
	return nil
}

// findPort returns the device of the guest channel, empty if it is not there yet.
func findPort(name string) (string, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return "", err
	}
	for _, path := range names {
		text, err := os.ReadFile(path)
		if err == nil && strings.TrimSpace(string(text)) == name {
			return "/dev/" + filepath.Base(filepath.Dir(path)), nil
		}
	}
	return "", nil
}
