package ext4fs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tool runs a program of e2fsprogs.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		t.Skip("e2fsprogs is not installed: ", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// empty makes an empty file system with the features that package image uses.
func empty(t testing.TB, size int64, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fs")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	args = append(args, path)
	tool(t, "mke2fs", append([]string{"-q", "-F", "-t", "ext4", "-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent," +
		"64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
		"-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-J", "size=32", "-E", "root_owner=0:0,discard,lazy_journal_init=1"}, args...)...)
	return path
}

func fill(t testing.TB, path, tree string, opts Options) error {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	return errors.Join(Fill(t.Context(), file, tree, opts), file.Close())
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// variedTree has a file of every kind, and everything that makes an inode differ.
func variedTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	put := func(name string, content []byte, mode fs.FileMode) {
		must(t, os.MkdirAll(filepath.Dir(at(name)), 0o755), os.WriteFile(at(name), content, mode), os.Chmod(at(name), mode))
	}
	put("empty", nil, 0o600)
	put("etc/small", []byte("small\n"), 0o644)
	put("etc/blocks", bytes.Repeat([]byte("0123456789abcdef"), 256*3), 0o640)
	put("etc/a \"strange\"\nname", []byte("strange"), 0o755)
	put("bin/setuid", []byte("program"), 0o755|fs.ModeSetuid)
	put("lost+found/thing", []byte("lost"), 0o644)
	put("large", bytes.Repeat([]byte("large"), 2<<20), 0o644)
	must(t, os.Link(at("etc/small"), at("etc/second name")), os.Link(at("etc/small"), at("third")))
	must(t, os.Symlink("etc/small", at("short")), os.Symlink(strings.Repeat("long/", 100), at("long")),
		os.Symlink(strings.Repeat("x", 59), at("inline")), os.Symlink(strings.Repeat("x", 60), at("block")))
	must(t, unix.Mkfifo(at("fifo"), 0o600), os.MkdirAll(at("a/b/c/d"), 0o700), os.Chmod(at("a"), fs.ModeSticky|0o777))
	for i := range 1000 {
		put(fmt.Sprintf("many/file with a name of some length %d", i), nil, 0o644)
	}
	for i := range 20 {
		must(t, os.MkdirAll(at(fmt.Sprintf("dirs/%d", i)), 0o755))
	}
	holes, err := os.Create(at("holes"))
	must(t, err)
	for i := range int64(1500) {
		_, err := holes.WriteAt([]byte("x"), i*3*blockSize+i)
		must(t, err)
	}
	must(t, holes.Truncate(20<<20), holes.Close())
	must(t, os.Chtimes(at("etc/small"), time.Time{}, time.Date(2040, 1, 2, 3, 4, 5, 678, time.UTC)))
	must(t, os.Chtimes(at("empty"), time.Time{}, time.Date(1950, 1, 2, 3, 4, 5, 0, time.UTC)))
	return dir
}

// list tells of everything in a tree what an image is to keep.
func list(t *testing.T, dir string, owners bool) map[string]string {
	t.Helper()
	found := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		var stat unix.Stat_t
		must(t, unix.Lstat(path, &stat))
		text := fmt.Sprintf("%o", stat.Mode)
		if owners {
			text += fmt.Sprintf(" %d %d", stat.Uid, stat.Gid)
		}
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			must(t, err)
			text += fmt.Sprintf(" %d %x %d", stat.Size, sum(content), stat.Mtim.Sec)
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			must(t, err)
			text += " " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			text += fmt.Sprint(stat.Rdev)
		}
		name, err := filepath.Rel(dir, path)
		found[name] = text
		return err
	}))
	return found
}

func sum(content []byte) uint32 { return checksum(0, content) }

func TestFill(t *testing.T) {
	t.Parallel()
	tree := variedTree(t)
	root := os.Getuid() == 0
	if root {
		must(t, os.Chown(filepath.Join(tree, "etc/blocks"), 70000, 80000), os.Lchown(filepath.Join(tree, "short"), 1, 2),
			unix.Mknod(filepath.Join(tree, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
			unix.Mknod(filepath.Join(tree, "disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))))
	}
	path := empty(t, 2<<30)
	before := tool(t, "dumpe2fs", path)
	must(t, fill(t, path, tree, Options{}))
	if report := tool(t, "e2fsck", "-f", "-n", path); strings.Contains(report, "?") {
		t.Errorf("e2fsck: %s", report)
	}
	if after := tool(t, "dumpe2fs", path); feature(before) != feature(after) {
		t.Errorf("features were %s, are %s", feature(before), feature(after))
	}
	var stat unix.Stat_t
	must(t, unix.Stat(path, &stat))
	if used := stat.Blocks * 512; used > 90<<20 {
		t.Errorf("it takes %d MiB: holes were filled", used>>20)
	}

	out := filepath.Join(t.TempDir(), "out")
	must(t, os.Mkdir(out, 0o755))
	if said := tool(t, "debugfs", "-R", "rdump / "+out, path); strings.Contains(said, "while") && root {
		t.Error(said)
	}
	got, want := list(t, out, root), list(t, tree, root)
	for name, text := range want {
		switch {
		case strings.Contains(text, " "+strings.Repeat("x", 60)), strings.Contains("fifo null disk short empty a bin/setuid lost+found", name):
			continue // debugfs dumps no special files, modes and owners of links; see below
		case got[name] != text:
			t.Errorf("%q is %q, want %q", name, got[name], text)
		}
	}
	for command, word := range map[string]string{
		"stat third":            "Links: 3",
		"stat bin/setuid":       "Mode:  04755",
		"stat a":                "Mode:  01777",
		"stat empty":            "mtime: 0xda62df25:00000000", // 1950
		"stat etc":              "Links: 2",
		"stat dirs":             "Links: 22",
		"stat block":            "Size: 60",
		"stat inline":           "Fast link dest: \"" + strings.Repeat("x", 59) + "\"",
		"stat fifo":             "Type: FIFO",
		"stat lost+found/thing": "Links: 1",
		"stat a/b":              "Mode:  0700",
		"ls -l many":            "file with a name of some length 999",
	} {
		if !strings.Contains(tool(t, "debugfs", "-R", command, path), word) {
			t.Errorf("%s does not tell of %q:\n%.600s", command, word, tool(t, "debugfs", "-R", command, path))
		}
	}
	if root {
		for command, word := range map[string]string{"stat short": "User:     1   Group:     2", "stat null": "Device major/minor number: 01:03", "stat disk": "(hex 103:11170)"} {
			if said := tool(t, "debugfs", "-R", command, path); !strings.Contains(said, word) {
				t.Errorf("%s does not tell of %q:\n%.400s", command, word, said)
			}
		}
	}
}

func feature(dump string) string {
	for line := range strings.Lines(dump) {
		if strings.HasPrefix(line, "Filesystem features") {
			return line
		}
	}
	return "none"
}

// Runs have no more blocks than an extent may, and leave metadata alone: a file system
// whose bitmaps and tables have been overwritten is not in order.
func TestAllocate(t *testing.T) {
	t.Parallel()
	path := empty(t, 2<<30)
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	fs, err := open(file)
	must(t, err)
	free := uint64(0)
	for _, g := range fs.groups {
		free += uint64(count16(g.desc, 0x0c, 0x2c))
	}
	runs, err := fs.allocate(free)
	must(t, err)
	for _, r := range runs {
		if r.count > maxRun {
			t.Errorf("a run of %d blocks", r.count)
		}
		_, writeErr := file.WriteAt([]byte("overwritten"), int64(r.first)*blockSize)
		must(t, writeErr)
	}
	if _, err := fs.allocate(1); !errors.Is(err, ErrNoSpace) {
		t.Errorf("one more than are free: %v", err)
	}
	must(t, file.Close())
	tool(t, "e2fsck", "-f", "-n", path)
}

// Owners are whose the caller says, whoever has the files.
func TestFillOwners(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	must(t, os.Mkdir(filepath.Join(tree, "home"), 0o755), os.WriteFile(filepath.Join(tree, "home/file"), nil, 0o600))
	path := empty(t, 256<<20)
	must(t, fill(t, path, tree, Options{Owner: func(name string, _ *unix.Stat_t) (uint32, uint32) {
		if name == "home/file" {
			return 1000, 100000
		}
		return 0, 0
	}}))
	if said := tool(t, "debugfs", "-R", "stat home/file", path); !strings.Contains(said, "User:  1000   Group: 100000") {
		t.Error(said)
	}
	if said := tool(t, "debugfs", "-R", "stat home", path); !strings.Contains(said, "User:     0   Group:     0") {
		t.Error(said)
	}
	tool(t, "e2fsck", "-f", "-n", path)
}

// Capabilities, access control lists and what users have attached are kept.
func TestFillXattrs(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	file, big := filepath.Join(tree, "file"), filepath.Join(tree, "big")
	must(t, os.WriteFile(file, nil, 0o640), os.WriteFile(big, nil, 0o640))
	if err := unix.Lsetxattr(file, "user.word", []byte("value"), 0); err != nil {
		t.Skip("this file system has no extended attributes: ", err)
	}
	long := bytes.Repeat([]byte("long"), 200)
	must(t, unix.Lsetxattr(big, "user.long", long, 0), unix.Lsetxattr(big, "user.a", []byte("b"), 0), unix.Lsetxattr(big, "user.none", nil, 0))
	// user::rw-, user:1000:r--, group::r--, mask::r--, other::---
	acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255,
		0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 0, 0, 255, 255, 255, 255}
	withACL := unix.Lsetxattr(file, "system.posix_acl_access", acl, 0) == nil
	path := empty(t, 256<<20)
	must(t, fill(t, path, tree, Options{}))
	tool(t, "e2fsck", "-f", "-n", path)
	tests := map[string]string{"ea_get file user.word": "value", "ea_get big user.long": string(long[:64]), "ea_get big user.a": "b"}
	if withACL {
		tests["ea_list file"] = "system.posix_acl_access (28)"
	}
	for command, word := range tests {
		if said := tool(t, "debugfs", "-R", command, path); !strings.Contains(said, word) {
			t.Errorf("%s does not tell of %q:\n%s", command, word, said)
		}
	}
}

func TestFillRefuses(t *testing.T) {
	t.Parallel()
	many := t.TempDir()
	for i := range 200 {
		must(t, os.WriteFile(filepath.Join(many, fmt.Sprint(i)), nil, 0o600))
	}
	if err := fill(t, empty(t, 128<<20, "-N", "64"), many, Options{}); !errors.Is(err, ErrNoInodes) {
		t.Errorf("too many: %v", err)
	}
	nothing := filepath.Join(t.TempDir(), "nothing")
	must(t, os.WriteFile(nothing, make([]byte, 1<<20), 0o600))
	if err := fill(t, nothing, many, Options{}); err == nil {
		t.Error("a file with no file system is filled")
	}
	if err := fill(t, empty(t, 128<<20), filepath.Join(many, "none"), Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no tree: %v", err)
	}
}

// Four times as many files of one directory take some four times as long, not sixteen.
func TestFillIsLinear(t *testing.T) {
	few, many := timeToFill(t, 2000), timeToFill(t, 8000)
	if ratio := float64(many) / float64(few); ratio > 9 {
		t.Errorf("2000 files took %v of CPU time, 8000 took %v: %.1f times as long", few, many, ratio)
	}
}

// timeToFill is the CPU time that so many files in one directory take, at best.
func timeToFill(t *testing.T, count int) time.Duration {
	t.Helper()
	tree := t.TempDir()
	for i := range count {
		must(t, os.WriteFile(filepath.Join(tree, fmt.Sprintf("file number %d", i)), nil, 0o600))
	}
	best := time.Hour
	for range 3 {
		path := empty(t, 1<<30)
		began := cpuTime(t)
		must(t, fill(t, path, tree, Options{}))
		best = min(best, cpuTime(t)-began)
	}
	return best
}

func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var usage unix.Rusage
	must(t, unix.Getrusage(unix.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
