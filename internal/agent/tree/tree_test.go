package tree

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// files lays files out below a new directory; a value with "->" before it is a link,
// one that is "/" a directory.
func files(t testing.TB, content map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	layOut(t, dir, content)
	return dir
}

func layOut(t testing.TB, dir string, content map[string]string) {
	t.Helper()
	check(t, os.MkdirAll(dir, 0o755))
	for name, text := range content {
		path := dir + "/" + name
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		target, isLink := strings.CutPrefix(text, "->")
		switch {
		case isLink:
			check(t, os.Symlink(target, path))
		case text == "/":
			check(t, os.MkdirAll(path, 0o755))
		case text == "|":
			check(t, unix.Mkfifo(path, 0o644))
		default:
			check(t, os.WriteFile(path, []byte(text), 0o640))
		}
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// show lists a tree: modes, names, contents.
func show(t testing.TB, root string) string {
	t.Helper()
	var out strings.Builder
	check(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		inner, _ := filepath.Rel(root, path)
		out.WriteString(info.Mode().String() + " " + inner)
		switch info.Mode().Type() {
		case 0:
			text, _ := os.ReadFile(path)
			out.WriteString(" " + string(text))
		case fs.ModeSymlink:
			target, _ := os.Readlink(path)
			out.WriteString(" -> " + target)
		default: // no content
		}
		out.WriteByte('\n')
		return nil
	}))
	return out.String()
}

// noted collects notes.
type noted []Note

func (n *noted) add(note Note) { *n = append(*n, note) }

func (n *noted) String() string {
	var out strings.Builder
	for _, note := range *n {
		if note.Failed {
			out.WriteString("FAILED ")
		}
		out.WriteString(note.String() + "\n")
	}
	return out.String()
}

// pack returns the stream of a tree.
func pack(t testing.TB, path string) *bytes.Buffer {
	t.Helper()
	var stream bytes.Buffer
	check(t, Send(t.Context(), NewEncoder(&stream), path, func(n Note) { t.Log(n) }))
	return &stream
}

// unpack receives a stream.
func unpack(t testing.TB, stream *bytes.Buffer, target Target) (string, error) {
	t.Helper()
	var notes noted
	err := Receive(t.Context(), NewDecoder(stream), target, notes.add)
	return notes.String(), err
}

// cp copies as a user's command does.
func cp(t testing.TB, source, dest string, untrusted bool) (string, error) {
	t.Helper()
	var notes noted
	var stream bytes.Buffer
	if err := Send(t.Context(), NewEncoder(&stream), source, notes.add); err != nil {
		return notes.String(), err
	}
	name, contents := SourceName(source)
	err := Receive(t.Context(), NewDecoder(&stream), Target{Path: dest, Name: name, Contents: contents, Untrusted: untrusted}, notes.add)
	return notes.String(), err
}

func TestCopy(t *testing.T) {
	source := files(t, map[string]string{"a": "one", "deep/er/b": "two", "link": "->deep/er/b", "dangling": "->no/where", "empty": ""})
	check(t, os.Chmod(filepath.Join(source, "deep"), 0o500))
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(source, "deep"), 0o700) })
	past := time.Date(2001, 2, 3, 4, 5, 6, 700, time.UTC)
	check(t, os.Chtimes(filepath.Join(source, "a"), past, past))
	check(t, os.Chtimes(filepath.Join(source, "deep"), past, past))
	target := filepath.Join(t.TempDir(), "copy")
	notes, err := cp(t, source, target, true)
	if err != nil || notes != "" {
		t.Fatal(err, notes)
	}
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(target, "deep"), 0o700) })
	if got, want := show(t, target), show(t, source); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	for _, name := range []string{"a", "deep"} {
		if info, err := os.Stat(filepath.Join(target, name)); err != nil || !info.ModTime().Equal(past) {
			t.Errorf("time of %s is %v (%v), want %v", name, info.ModTime(), err, past)
		}
	}
}

// TestRules checks what lands where against cp -r and docker cp, for both directions
// (cases 9 and A4).
func TestRules(t *testing.T) {
	tests := map[string]struct {
		source, dest string
		want         map[string]string // below the directory of the targets, beside what is there
		err          string
	}{
		"file to a new name":              {"f", "new", map[string]string{"new": "file"}, ""},
		"file into a directory":           {"f", "dir", map[string]string{"dir/f": "file"}, ""},
		"file into a directory/":          {"f", "dir/", map[string]string{"dir/f": "file"}, ""},
		"file into a directory/.":         {"f", "dir/.", map[string]string{"dir/f": "file"}, ""},
		"file over a file":                {"f", "file", map[string]string{"file": "file"}, ""},
		"file to a file/":                 {"f", "file/", nil, "not a directory"},
		"file to a new name/":             {"f", "new/", nil, "no such directory"},
		"file to no parent":               {"f", "no/new", nil, "no such file"},
		"file below a file":               {"f", "file/new", nil, "not a directory"},
		"file over a directory":           {"f", "has-dir", nil, "is a directory"},
		"file/ is none":                   {"f/", "new", nil, "not a directory"},
		"file through a link to dir":      {"f", "to-dir", map[string]string{"dir/f": "file"}, ""},
		"directory to a new name":         {"d", "new", map[string]string{"new/in": "inner"}, ""},
		"directory to a new name/":        {"d", "new/", map[string]string{"new/in": "inner"}, ""},
		"directory/ to a new name":        {"d/", "new", map[string]string{"new/in": "inner"}, ""},
		"directory into one":              {"d", "dir", map[string]string{"dir/d/in": "inner"}, ""},
		"directory/ into one/":            {"d/", "dir/", map[string]string{"dir/d/in": "inner"}, ""},
		"directory merges":                {"d", "has-d", map[string]string{"has-d/d/in": "inner"}, ""},
		"directory over a file":           {"d", "file", nil, "not a directory"},
		"directory over a file in one":    {"d", "has-file-d", nil, "not a directory"},
		"directory over a link in one":    {"d", "has-link-d", nil, "not a directory"},
		"directory to no parent":          {"d", "no/new", nil, "no such file"},
		"directory to no parent/":         {"d", "no/new/", nil, "no such file"},
		"contents to a new name":          {"d/.", "new", map[string]string{"new/in": "inner"}, ""},
		"contents into a directory":       {"d/.", "dir", map[string]string{"dir/in": "inner"}, ""},
		"contents into a directory/":      {"d/./", "dir/", map[string]string{"dir/in": "inner"}, ""},
		"contents over a file":            {"d/.", "file", nil, "not a directory"},
		"contents by dot dot":             {"d/sub/..", "dir", map[string]string{"dir/in": "inner"}, ""},
		"contents through a link":         {"to-d/.", "dir", map[string]string{"dir/in": "inner"}, ""},
		"contents of a file":              {"f/.", "dir", nil, "not a directory"},
		"link to a file is the file":      {"to-f", "dir", map[string]string{"dir/to-f": "file"}, ""},
		"link to a directory is that":     {"to-d", "dir", map[string]string{"dir/to-d/in": "inner"}, ""},
		"nothing":                         {"none", "dir", nil, "no such file"},
		"an empty source":                 {"", "dir", nil, "empty path"},
		"an empty target":                 {"f", "", nil, "empty path"},
		"a name that is no text":          {"b\xff", "dir", map[string]string{"dir/b\xff": "bytes"}, ""},
		"a target that is no text":        {"f", "new\xff", map[string]string{"new\xff": "file"}, ""},
		"a target with a line feed":       {"f", "new\n", map[string]string{"new\n": "file"}, ""},
		"a name in the place of a quote":  {"f", `new"`, map[string]string{`new"`: "file"}, ""},
		"directory into a link to dir":    {"d", "to-dir", map[string]string{"dir/d/in": "inner"}, ""},
		"contents into a link to dir":     {"d/.", "to-dir", map[string]string{"dir/in": "inner"}, ""},
		"directory to a link to nothing":  {"d", "dangling", nil, "symbolic link"},
		"contents merge, links are links": {"d/.", "has-sub", nil, ""},
	}
	for name, test := range tests {
		for _, untrusted := range []bool{false, true} {
			t.Run(name+map[bool]string{false: ", in", true: ", out"}[untrusted], func(t *testing.T) {
				from, to := t.TempDir()+"/from/", t.TempDir()+"/to/"
				layOut(t, from, map[string]string{"f": "file", "d/in": "inner", "d/sub": "/", "to-f": "->f", "to-d": "->d", "b\xff": "bytes"})
				there := map[string]string{
					"file": "old", "dir": "/", "to-dir": "->dir", "has-dir/f": "/", "has-d/d/other": "stays", "dangling": "->nothing",
					"has-file-d/d": "old", "has-link-d/d": "->../dir", "has-sub/sub/kept": "stays",
				}
				layOut(t, to, there)
				source, dest := test.source, test.dest
				if source != "" {
					source = from + source
				}
				if dest != "" {
					dest = to + dest
				}
				before := show(t, to)
				notes, err := cp(t, source, dest, untrusted)
				if test.err != "" {
					if err == nil || !strings.Contains(err.Error(), test.err) {
						t.Errorf("error is %v, want %q", err, test.err)
					}
					if after := show(t, to); after != before {
						t.Errorf("it has become\n%sfrom\n%s", after, before)
					}
					return
				}
				if err != nil || notes != "" {
					t.Fatalf("%v, %s", err, notes)
				}
				for path, want := range test.want {
					if got, err := os.ReadFile(to + path); err != nil || string(got) != want {
						t.Errorf("%s is %q (%v), want %q", path, got, err, want)
					}
				}
				if _, err := os.Stat(to + "has-d/d/other"); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// A relative path is one of the working directory.
func TestRelativePaths(t *testing.T) {
	t.Chdir(files(t, map[string]string{"d/in": "inner", "to": "/"}))
	for _, source := range []string{"d", "./d/."} {
		if _, err := cp(t, source, "to", true); err != nil {
			t.Error(err)
		}
	}
	if _, err := cp(t, "d/in", "new", true); err != nil {
		t.Error(err)
	}
	for _, path := range []string{"to/d/in", "to/in", "new"} {
		if text, err := os.ReadFile(path); err != nil || string(text) != "inner" {
			t.Errorf("%s is %q (%v)", path, text, err)
		}
	}
}

// What can't be sent is left out and told of, and the rest is sent.
func TestLeftOut(t *testing.T) {
	source := files(t, map[string]string{"a": "one", "fifo": "|", "z": "last"})
	address := filepath.Join(source, "sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	check(t, err)
	defer func() { _ = unix.Close(fd) }()
	check(t, unix.Bind(fd, &unix.SockaddrUnix{Name: address}))
	target := filepath.Join(t.TempDir(), "copy")
	notes, err := cp(t, source, target, false)
	for _, want := range []string{source + "/fifo: left out: it is a FIFO\n", source + "/sock: left out: it is a socket\n"} {
		if !strings.Contains(notes, want) {
			t.Errorf("notes are %q, want %q", notes, want)
		}
	}
	if err != nil || strings.Contains(notes, "FAILED") {
		t.Error(err, notes)
	}
	for _, name := range []string{"a", "z"} {
		if _, err := os.Stat(filepath.Join(target, name)); err != nil {
			t.Error(err)
		}
	}
}

// TestVanishing copies a tree in which files come and go (case 7).
func TestVanishing(t *testing.T) {
	content := map[string]string{}
	for i := range 50 {
		content["z"+strings.Repeat("z", i)] = "stays"
	}
	source := files(t, content)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			for _, name := range []string{"a", "b", "c", "d"} {
				_ = os.WriteFile(filepath.Join(source, name), []byte(name), 0o600)
			}
			for _, name := range []string{"a", "b", "c", "d"} {
				_ = os.Remove(filepath.Join(source, name))
			}
		}
	}()
	for range 5 {
		target := filepath.Join(t.TempDir(), "copy")
		notes, err := cp(t, source, target, true)
		if err != nil || strings.Contains(notes, "FAILED") {
			t.Fatal(err, notes)
		}
		kept, err := filepath.Glob(target + "/z*")
		if err != nil || len(kept) != 50 {
			t.Fatalf("%d files of 50 are there (%v)", len(kept), err)
		}
	}
	stop()
	<-ended
}

// A file that changes its length while it is read is copied as far as it goes, and no
// further than it went.
func TestChangingLength(t *testing.T) {
	source := files(t, map[string]string{"grows": strings.Repeat("x", 200_000), "shrinks": strings.Repeat("y", 200_000), "z": "last"})
	for name, change := range map[string]func(string) error{
		"grows":   func(path string) error { return os.Truncate(path, 300_000) },
		"shrinks": func(path string) error { return os.Truncate(path, 70_000) },
	} {
		t.Run(name, func(t *testing.T) {
			var stream bytes.Buffer
			var notes noted
			changed := false
			// The encoder writes 64 KiB when the file has begun.
			out := NewEncoder(writerFunc(func(p []byte) (int, error) {
				if !changed {
					changed = true
					check(t, change(filepath.Join(source, name)))
				}
				return stream.Write(p)
			}))
			check(t, Send(t.Context(), out, filepath.Join(source, name), notes.add))
			target := filepath.Join(t.TempDir(), "copy")
			if _, err := unpack(t, &stream, Target{Path: target}); err != nil {
				t.Fatal(err)
			}
			want := map[string]int64{"grows": 200_000, "shrinks": 70_000}[name]
			if info, err := os.Stat(target); err != nil || info.Size() != want {
				t.Errorf("it has %d bytes (%v), want %d", info.Size(), err, want)
			}
			if told := strings.Contains(notes.String(), "became shorter"); told != (name == "shrinks") {
				t.Errorf("notes are %q", notes.String())
			}
		})
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Holes stay holes, and what is between them is kept.
func TestSparse(t *testing.T) {
	source := filepath.Join(t.TempDir(), "sparse")
	file, err := os.Create(source)
	check(t, err)
	for _, offset := range []int64{0, 10 << 20, 10<<20 + 5000, 300 << 20} {
		_, err := file.WriteAt([]byte("data"), offset)
		check(t, err)
	}
	check(t, file.Truncate(400<<20))
	check(t, file.Close())
	stream := pack(t, source)
	if stream.Len() > 1<<20 {
		t.Errorf("the stream has %d bytes", stream.Len())
	}
	dir := t.TempDir()
	layOut(t, dir, map[string]string{"old": "old", "linked": "old"})
	check(t, os.Link(dir+"/linked", dir+"/other"))
	for _, name := range []string{"new", "old", "linked"} {
		target := filepath.Join(dir, name)
		if _, err := unpack(t, bytes.NewBuffer(stream.Bytes()), Target{Path: target}); err != nil {
			t.Fatal(err)
		}
		var stat unix.Stat_t
		check(t, unix.Stat(target, &stat))
		if stat.Size != 400<<20 || stat.Blocks*512 > 2<<20 {
			t.Errorf("%s has %d bytes in %d blocks", name, stat.Size, stat.Blocks)
		}
		copied, err := os.Open(target)
		check(t, err)
		for _, offset := range []int64{0, 10 << 20, 10<<20 + 5000, 300 << 20} {
			p := make([]byte, 5)
			if _, err := copied.ReadAt(p, offset); err != nil || string(p) != "data\x00" {
				t.Errorf("%s at %d: %q, %v", name, offset, p, err)
			}
		}
		check(t, copied.Close())
	}
}

// A directory of the kernel's is copied if it is named, and left empty within another.
func TestKernelFiles(t *testing.T) {
	target := filepath.Join(t.TempDir(), "f")
	if notes, err := cp(t, "/proc/self/status", target, true); err != nil || notes != "" {
		t.Fatal(err, notes)
	}
	if text, err := os.ReadFile(target); err != nil || !strings.HasPrefix(string(text), "Name:") {
		t.Errorf("it is %q (%v)", text, err)
	}
	m := readMounts()
	var stat unix.Stat_t
	check(t, unix.Stat("/proc", &stat))
	if kind := m.kernel(stat.Dev); kind != "proc" {
		t.Errorf("/proc is of type %q", kind)
	}
	check(t, unix.Stat(t.TempDir(), &stat))
	if kind := m.kernel(stat.Dev); kind != "" {
		t.Errorf("%s is of type %q", t.TempDir(), kind)
	}
}

func TestSourceName(t *testing.T) {
	for path, want := range map[string]struct {
		name     string
		contents bool
	}{
		"f": {"f", false}, "/a/f": {"f", false}, "d/": {"d", false}, "d//": {"d", false},
		"d/.": {"", true}, "d/./": {"", true}, ".": {"", true}, "..": {"", true}, "d/..": {"", true},
		"/": {"", true}, "...": {"...", false}, ".hidden": {".hidden", false},
	} {
		if name, contents := SourceName(path); name != want.name || contents != want.contents {
			t.Errorf("SourceName(%q) = %q, %v", path, name, contents)
		}
	}
}
