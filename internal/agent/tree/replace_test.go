package tree

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// one is the stream of a single file.
func one(t testing.TB, content string) *bytes.Buffer {
	t.Helper()
	return stream(t, func(e *Encoder) {
		_ = e.Begin(Entry{Kind: File, Mode: 0o755, ModTime: time.Unix(1_000_000_000, 0), Size: int64(len(content))})
		for piece := range strings.SplitSeq(content, "|") {
			if piece != "" {
				_ = e.Data([]byte(piece))
			}
		}
		_ = e.EndFile("")
		_ = e.End()
	})
}

// A file that is copied over keeps its owner and mode, and if it has several names stays
// the same file (case 13).
func TestOverAFile(t *testing.T) {
	for _, untrusted := range []bool{false, true} {
		for _, linked := range []bool{false, true} {
			dir := t.TempDir()
			path := filepath.Join(dir, "f")
			check(t, os.WriteFile(path, []byte("old, and longer"), 0o640))
			if os.Getuid() == 0 {
				check(t, os.Chown(path, 65534, 65533))
			}
			if linked {
				check(t, os.Link(path, path+"2"))
			}
			var before, after unix.Stat_t
			check(t, unix.Stat(path, &before))
			if notes, err := unpack(t, one(t, "new"), Target{Path: path, Untrusted: untrusted}); err != nil || notes != "" {
				t.Fatal(err, notes)
			}
			check(t, unix.Stat(path, &after))
			if after.Uid != before.Uid || after.Gid != before.Gid || after.Mode != before.Mode || after.Mtim.Sec != 1_000_000_000 {
				t.Errorf("it was %+v, is %+v", before, after)
			}
			names := []string{path}
			if linked {
				names = append(names, path+"2")
			}
			for _, name := range names {
				if text, err := os.ReadFile(name); err != nil || string(text) != "new" {
					t.Errorf("%s is %q (%v)", name, text, err)
				}
			}
			if linked != (after.Ino == before.Ino) {
				t.Errorf("linked %v: the same file %v", linked, after.Ino == before.Ino)
			}
			checkNoTemps(t, dir)
		}
	}
}

func checkNoTemps(t testing.TB, dir string) {
	t.Helper()
	if temps, err := filepath.Glob(filepath.Join(dir, ".smolvm-*")); err != nil || len(temps) > 0 {
		t.Errorf("%v is left (%v)", temps, err)
	}
}

// A set-id bit of a file stands for its content, so it does not stay when an untrusted
// sender replaces that.
func TestOverASetIDFile(t *testing.T) {
	for untrusted, want := range map[bool]os.FileMode{false: os.ModeSetuid | 0o755, true: 0o755} {
		for _, linked := range []bool{false, true} {
			path := filepath.Join(t.TempDir(), "f")
			check(t, os.WriteFile(path, nil, 0o600))
			check(t, os.Chmod(path, os.ModeSetuid|0o755))
			if linked {
				check(t, os.Link(path, path+"2"))
			}
			_, err := unpack(t, one(t, "new"), Target{Path: path, Untrusted: untrusted})
			check(t, err)
			info, err := os.Stat(path)
			check(t, err)
			if os.Getuid() == 0 && info.Mode() != want || untrusted && info.Mode() != want {
				t.Errorf("untrusted %v, linked %v: mode is %v", untrusted, linked, info.Mode())
			}
		}
	}
}

// A copy that ends too soon leaves the old file, and no half of a new one (A3).
func TestCutShort(t *testing.T) {
	whole := one(t, "first half|second half").Bytes()
	for _, there := range []bool{false, true} {
		for _, length := range []int{10, 40, 60, len(whole) - 12} {
			dir := t.TempDir()
			path := filepath.Join(dir, "f")
			if there {
				check(t, os.WriteFile(path, []byte("old"), 0o600))
			}
			if _, err := unpack(t, bytes.NewBuffer(whole[:length]), Target{Path: path}); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("after %d bytes: %v", length, err)
			}
			text, err := os.ReadFile(path)
			if there && string(text) != "old" || !there && err == nil {
				t.Errorf("after %d bytes it is %q (%v)", length, text, err)
			}
			checkNoTemps(t, dir)
		}
	}
}

// The same for a file that its sender can't read to its end.
func TestSenderFails(t *testing.T) {
	dir := t.TempDir()
	layOut(t, dir, map[string]string{"f": "old"})
	notes, err := unpack(t, stream(t, func(e *Encoder) {
		write(e, Entry{Kind: Dir})
		_ = e.Begin(file("f"))
		_ = e.Data([]byte("half"))
		_ = e.EndFile("input/output error")
		write(e, file("g"))
		_ = e.Leave()
		_ = e.End()
	}), Target{Path: dir, Contents: true})
	if err != nil {
		t.Error(err, notes)
	}
	if text, err := os.ReadFile(dir + "/f"); err != nil || string(text) != "old" {
		t.Errorf("it is %q (%v)", text, err)
	}
	if _, err := os.Stat(dir + "/g"); err != nil {
		t.Error(err)
	}
	checkNoTemps(t, dir)
}

// A file system that is full is an end, and leaves the old file (A3).
func TestFullDisk(t *testing.T) {
	dir := smallDisk(t)
	path := filepath.Join(dir, "keep")
	check(t, os.WriteFile(path, []byte("old"), 0o600))
	for _, target := range []Target{{Path: path}, {Path: dir, Name: "new"}} {
		if _, err := unpack(t, one(t, strings.Repeat(strings.Repeat("x", 50_000)+"|", 100)), target); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("error is %v", err)
		}
	}
	// With two names it is written over, for which there must be room twice.
	check(t, os.Link(path, path+"2"))
	if _, err := unpack(t, one(t, strings.Repeat(strings.Repeat("x", 60_000)+"|", 25)), Target{Path: path}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("error is %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "old" {
		t.Errorf("it is %q (%v)", text, err)
	}
	if _, err := os.Stat(dir + "/new"); err == nil {
		t.Error("half of a file is left")
	}
	checkNoTemps(t, dir)
}

// smallDisk mounts a file system of 2 MB.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("smolvm-test", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skip("no file system can be mounted here: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// A file that something is mounted on is written over.
func TestMountPoint(t *testing.T) {
	dir := t.TempDir()
	layOut(t, dir, map[string]string{"real": "old", "mounted": ""})
	if err := unix.Mount(dir+"/real", dir+"/mounted", "", unix.MS_BIND, ""); err != nil {
		t.Skip("nothing can be mounted here: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir+"/mounted", unix.MNT_DETACH) })
	if _, err := unpack(t, one(t, "new"), Target{Path: dir + "/mounted", Untrusted: true}); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(dir + "/real"); err != nil || string(text) != "new" {
		t.Errorf("it is %q (%v)", text, err)
	}
	checkNoTemps(t, dir)
}

// So is one in a directory in which nothing can be made.
func TestDirectoryThatCantBeWritten(t *testing.T) {
	dir := smallDisk(t)
	inner := smallDisk(t)
	check(t, os.WriteFile(dir+"/f", nil, 0o600))
	check(t, os.WriteFile(inner+"/f", []byte("old"), 0o600))
	check(t, unix.Mount(inner+"/f", dir+"/f", "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(dir+"/f", unix.MNT_DETACH) })
	check(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	if _, err := unpack(t, one(t, "new"), Target{Path: dir + "/f"}); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(inner + "/f"); err != nil || string(text) != "new" {
		t.Errorf("it is %q (%v)", text, err)
	}
	if _, err := unpack(t, one(t, "new"), Target{Path: dir, Name: "g"}); !errors.Is(err, unix.EROFS) {
		t.Errorf("a new file: %v", err)
	}
}

// A FIFO or device that the target names is written to, from either side (case 3).
func TestSpecialTargets(t *testing.T) {
	for _, untrusted := range []bool{false, true} {
		dir := t.TempDir()
		layOut(t, dir, map[string]string{"fifo": "|", "link": "->fifo"})
		for _, target := range []Target{{Path: dir + "/fifo"}, {Path: dir + "/link"}, {Path: dir, Name: "fifo"}} {
			target.Untrusted = untrusted
			got := make(chan string)
			go func() {
				text, _ := os.ReadFile(dir + "/fifo")
				got <- string(text)
			}()
			if _, err := unpack(t, one(t, "new|er"), target); err != nil {
				t.Fatal(err)
			}
			if text := <-got; text != "newer" {
				t.Errorf("%+v: %q came out of it", target, text)
			}
		}
		if err := unix.Mknod(dir+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
			t.Skip("no device can be made here: ", err)
		}
		if _, err := unpack(t, one(t, "new"), Target{Path: dir + "/null", Untrusted: untrusted}); err != nil {
			// The file system may allow none.
			if errors.Is(err, os.ErrPermission) {
				t.Skip(err)
			}
			t.Fatal(err)
		}
		if info, err := os.Stat(dir + "/null"); err != nil || info.Mode()&os.ModeCharDevice == 0 {
			t.Errorf("it is %v (%v)", info.Mode(), err)
		}
	}
}

// A descriptor of this process is written to where it is, be it a pipe or a file, and
// its name is left alone.
func TestOwnDescriptors(t *testing.T) {
	reader, writer, err := os.Pipe()
	check(t, err)
	regular, err := os.Create(filepath.Join(t.TempDir(), "f"))
	check(t, err)
	_, err = regular.WriteString("before ")
	check(t, err)
	for _, file := range []*os.File{writer, regular} {
		// A directory like /dev, with a link like /dev/stdout.
		dir := t.TempDir()
		name := dir + "/stdout"
		var fd uintptr
		raw, err := file.SyscallConn()
		check(t, err)
		check(t, raw.Control(func(n uintptr) { fd = n }))
		check(t, os.Symlink("/proc/self/fd/"+strconv.Itoa(int(fd)), name))
		if _, err := unpack(t, one(t, "new"), Target{Path: name, Untrusted: true}); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Lstat(name); err != nil || info.Mode().Type() != os.ModeSymlink {
			t.Errorf("the link is %v (%v)", info.Mode(), err)
		}
	}
	check(t, writer.Close())
	if text, err := io.ReadAll(reader); err != nil || string(text) != "new" {
		t.Errorf("the pipe has %q (%v)", text, err)
	}
	if text, err := os.ReadFile(regular.Name()); err != nil || string(text) != "before new" {
		t.Errorf("the file has %q (%v)", text, err)
	}
	// One that is closed is an error, and its name stays too.
	dir := t.TempDir()
	check(t, os.Symlink("/proc/self/fd/987", dir+"/stdout"))
	if _, err := unpack(t, one(t, "new"), Target{Path: dir + "/stdout", Untrusted: true}); err == nil {
		t.Error("a closed descriptor is taken")
	}
	if info, err := os.Lstat(dir + "/stdout"); err != nil || info.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link is %v (%v)", info.Mode(), err)
	}
}

// Waiting for the other end of a FIFO ends with the context, and so does writing to one
// that nobody reads from.
func TestWaitingEnds(t *testing.T) {
	dir := t.TempDir()
	layOut(t, dir, map[string]string{"fifo": "|", "send": "|", "receive": "|"})
	for name, wait := range map[string]func(context.Context) error{
		"send": func(ctx context.Context) error {
			return Send(ctx, NewEncoder(io.Discard), dir+"/send", func(Note) {})
		},
		"receive": func(ctx context.Context) error {
			return Receive(ctx, NewDecoder(one(t, "x")), Target{Path: dir + "/receive"}, func(Note) {})
		},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if err := wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
	reader, err := os.OpenFile(dir+"/fifo", os.O_RDONLY|unix.O_NONBLOCK, 0)
	check(t, err)
	defer func() { _ = reader.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	much := one(t, strings.Repeat(strings.Repeat("x", 50_000)+"|", 10))
	if err := Receive(ctx, NewDecoder(much), Target{Path: dir + "/fifo"}, func(Note) {}); err == nil {
		t.Error("more is written than a FIFO holds")
	}
}

// A hard link of a trusted sender is one of a file that came before.
func TestHardLinks(t *testing.T) {
	target := filepath.Join(t.TempDir(), "t")
	notes, err := unpack(t, stream(t, func(e *Encoder) {
		write(e, dir(""), dir("d"), file("f"))
		_ = e.Leave()
		write(e, Entry{Kind: HardLink, Name: "h", Link: "d/f"}, Entry{Kind: HardLink, Name: "h", Link: "d/f"},
			symlink("l", "/etc"), Entry{Kind: HardLink, Name: "evil", Link: "l/passwd"}, Entry{Kind: HardLink, Name: "evil", Link: "../x"})
		_ = e.Leave()
		_ = e.End()
	}), Target{Path: target})
	check(t, err)
	var f, h unix.Stat_t
	check(t, unix.Stat(target+"/d/f", &f))
	check(t, unix.Stat(target+"/h", &h))
	if f.Ino != h.Ino || f.Nlink != 2 {
		t.Errorf("%+v and %+v are two", f, h)
	}
	if strings.Count(notes, "FAILED") != 2 {
		t.Errorf("notes are %q", notes)
	}
}
