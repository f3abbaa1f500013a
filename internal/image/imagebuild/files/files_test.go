package files

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/image/ext4fs"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func open(t testing.TB, dir string) *Dir {
	t.Helper()
	d, err := OpenDir(dir)
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// What is no file is left out, or refused, and keeps nobody waiting.
func TestSpecialFiles(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir) // names of sockets are short
	must(t, unix.Mkfifo("pipe", 0o600), os.WriteFile("file", []byte("x"), 0o604))
	listener, err := net.Listen("unix", "socket")
	must(t, err)
	defer func() { _ = listener.Close() }()
	d := open(t, dir)
	names, err := d.Names("")
	must(t, err)
	if diff := cmp.Diff([]string{"file", "pipe"}, names); diff != "" {
		t.Error(diff)
	}
	pipe, err := d.Lstat("pipe")
	must(t, err)
	if pipe.Type() != unix.S_IFIFO {
		t.Errorf("the pipe is %+v", pipe)
	}
	if _, err := d.Open("pipe"); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("opened a pipe: %v", err)
	}
	if _, err := d.Lstat("socket"); err == nil || !strings.Contains(err.Error(), "can be copied") {
		t.Errorf("a socket: %v", err)
	}
	file, err := d.Lstat("file")
	must(t, err)
	if file.Mode != unix.S_IFREG|0o604 || file.UID != 0 || file.GID != 0 || file.Size != 1 {
		t.Errorf("the file is %+v", file)
	}
}

// No name leads out of a directory, even if it becomes a link when it has been looked at.
func TestDirIsClosed(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("x"), 0o600), os.Mkdir(filepath.Join(dir, "d"), 0o700), os.Symlink(outside, filepath.Join(dir, "out")))
	d := open(t, dir)
	for _, name := range []string{"out/secret", "../" + filepath.Base(outside) + "/secret", filepath.Join(outside, "secret")} {
		if file, err := d.Open(name); err == nil {
			t.Errorf("opened %s", name)
			_ = file.Close()
		}
		if _, err := d.Lstat(name); err == nil {
			t.Errorf("found %s", name)
		}
	}
	if _, err := d.Names("out"); err == nil {
		t.Error("listed what a link leads to")
	}
	if _, _, err := Resolve(d, "out/secret"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("resolved a link out: %v", err)
	}
}

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755), os.WriteFile(filepath.Join(dir, "a/b/c"), nil, 0o600), os.Symlink("/a/b", filepath.Join(dir, "abs")),
		os.Symlink("../..", filepath.Join(dir, "a/top")), os.Symlink("self", filepath.Join(dir, "self")), os.Symlink("b/none", filepath.Join(dir, "a/to-none")))
	d := open(t, dir)
	for _, test := range []struct {
		name, want string
		err        error
	}{
		{"", "", nil}, {"a/b/c", "a/b/c", nil}, {"abs/c", "a/b/c", nil}, {"a/top/a/./b//c", "a/b/c", nil}, {"../../a/b/../b", "a/b", nil},
		{"a/none", "a/none", fs.ErrNotExist}, {"a/none/x/..", "a/none", fs.ErrNotExist}, {"a/none/../b", "a/b", nil}, {"a/to-none", "a/b/none", fs.ErrNotExist},
		{"a/b/c/d", "", unix.ENOTDIR}, {"self", "", errLoop},
	} {
		actual, _, err := Resolve(d, test.name)
		if actual != test.want || !errors.Is(err, test.err) || err != nil && test.err == nil {
			t.Errorf("%q: %q, %v", test.name, actual, err)
		}
	}
}

func TestReadIgnore(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir)
	if _, there, err := ReadIgnore(d, IgnoreFile); err != nil || there {
		t.Errorf("there is none: %v, %v", there, err)
	}
	for text, want := range map[string]bool{"a\n!a/b": true, "[": false, strings.Repeat("a\n", maxIgnoreSize): false} {
		must(t, os.WriteFile(filepath.Join(dir, IgnoreFile), []byte(text), 0o600))
		if _, there, err := ReadIgnore(d, IgnoreFile); !there || (err == nil) != want {
			t.Errorf("%.20q: %v, %v", text, there, err)
		}
	}
}

func TestSpool(t *testing.T) {
	dir := t.TempDir()
	spool, err := NewSpool(dir, 5<<20)
	must(t, err)
	defer func() { _ = spool.Close() }()
	content := map[string]string{"empty": "", "a": "A", "zeros": strings.Repeat("\x00", 3<<20), "b": "B" + strings.Repeat("\x00", 2<<20), "large": strings.Repeat("x", 5<<20+1), "end": strings.Repeat("\x00", 100)}
	root := &ext4fs.Node{Mode: unix.S_IFDIR, Children: map[string]*ext4fs.Node{}}
	for _, name := range []string{"a", "zeros", "b", "large", "empty", "end"} {
		data, err := spool.Add(strings.NewReader(content[name]), int64(len(content[name])))
		must(t, err)
		root.Children[name] = &ext4fs.Node{Mode: unix.S_IFREG, Data: data}
	}
	tree := Nodes{Root: root, Spool: spool}
	for name, want := range content {
		file, err := tree.Open(name)
		if name == "large" {
			if err == nil {
				t.Error("what is too large was kept")
			}
			continue
		}
		must(t, err)
		got, err := io.ReadAll(file)
		must(t, err)
		if !bytes.Equal(got, []byte(want)) {
			t.Errorf("%s has %d bytes, want %d", name, len(got), len(want))
		}
	}
	if _, err := spool.Add(strings.NewReader("x"), 2); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		t.Errorf("content that is cut: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v (%v)", left, err)
	}
}
