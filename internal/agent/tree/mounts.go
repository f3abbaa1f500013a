package tree

import (
	"bufio"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// mounts knows the file systems whose files the kernel makes up; see kernelFS.
type mounts struct{ kinds map[uint64]string }

// kernelFS reports whether the kernel makes up the files of a type of file systems.
func kernelFS(kind string) bool {
	switch kind {
	case "proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs",
		"configfs", "efivarfs", "pstore", "bpf", "mqueue", "binfmt_misc", "fusectl", "selinuxfs", "smackfs", "nsfs", "rpc_pipefs":
		return true
	}
	return false
}

// readMounts reads the table of mounts. Where there is none, no file system counts as
// the kernel's.
func readMounts() *mounts {
	m := &mounts{kinds: map[uint64]string{}}
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return m
	}
	defer func() { _ = file.Close() }()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw: see proc(5).
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 3 || len(kind) == 0 || !kernelFS(kind[0]) {
			continue
		}
		if dev, ok := parseDevice(fields[2]); ok {
			m.kinds[dev] = kind[0]
		}
	}
	return m
}

func parseDevice(text string) (uint64, bool) {
	major, minor, ok := strings.Cut(text, ":")
	a, errA := parseUint32(major)
	b, errB := parseUint32(minor)
	return unix.Mkdev(a, b), ok && errA == nil && errB == nil
}

// kernel returns the type of the file system of a device, if it is one of the kernel's;
// else an empty string.
func (m *mounts) kernel(dev uint64) string {
	if m == nil {
		return ""
	}
	return m.kinds[dev]
}
