package tree

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// files lays files out below a new directory; a value with "->" before it is a link.
func files(t *testing.T, content map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range content {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if target, ok := strings.CutPrefix(text, "->"); ok {
			if err := os.Symlink(target, path); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// show lists a tree: modes, names, contents.
func show(t *testing.T, root string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
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
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func pack(t *testing.T, root string) *bytes.Buffer {
	t.Helper()
	var stream bytes.Buffer
	if err := Write(&stream, root); err != nil {
		t.Fatal(err)
	}
	return &stream
}

func TestCopy(t *testing.T) {
	source := files(t, map[string]string{"a": "one", "deep/er/b": "two", "link": "->deep/er/b", "dangling": "->/no/where"})
	if err := os.Chmod(filepath.Join(source, "deep"), 0o500); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(source, "deep"), 0o700) })
	past := time.Date(2001, 2, 3, 4, 5, 6, 700, time.UTC)
	if err := os.Chtimes(filepath.Join(source, "a"), past, past); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(t.TempDir(), "copy")
	if err := Extract(pack(t, source), Target{Path: target, Name: "tree"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(target, "deep"), 0o700) })
	if got, want := show(t, target), show(t, source); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if info, err := os.Stat(filepath.Join(target, "a")); err != nil || !info.ModTime().Equal(past) {
		t.Errorf("time is %v, want %v", info.ModTime(), past)
	}
}

// Where a copy lands is as cp has it.
func TestTargets(t *testing.T) {
	file := filepath.Join(files(t, map[string]string{"f": "new"}), "f")
	dir := t.TempDir()
	existing := filepath.Join(dir, "existing")
	if err := os.WriteFile(existing, []byte("old and longer"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ path, want, err string }{
		"a new name":        {dir + "/new", dir + "/new", ""},
		"into a directory":  {dir, dir + "/f", ""},
		"with a slash":      {dir + "/", dir + "/f", ""},
		"over a file":       {existing, existing, ""},
		"no such parent":    {dir + "/no/such", "", "no such file"},
		"no such directory": {dir + "/nosuch/", "", "no such directory"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Extract(pack(t, file), Target{Path: test.path, Name: "f"})
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error is %v, want %q", err, test.err)
				}
				return
			}
			if got, readErr := os.ReadFile(test.want); err != nil || readErr != nil || string(got) != "new" {
				t.Errorf("%s is %q (%v, %v)", test.want, got, err, readErr)
			}
		})
	}
}

func stream(t testing.TB, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, header := range headers {
		if header.Mode == 0 {
			header.Mode = 0o755
		}
		if err := w.WriteHeader(&header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(bytes.Repeat([]byte("x"), int(header.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &out
}

// Whatever a sender tries, nothing outside the target appears or changes.
func TestMaliciousStreams(t *testing.T) {
	root := tar.Header{Name: ".", Typeflag: tar.TypeDir}
	file := func(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 3} }
	link := func(name, to string) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}
	}
	for name, headers := range map[string][]tar.Header{
		"dot dot":              {root, file("../evil")},
		"dot dot inside":       {root, file("./a/../../evil")},
		"absolute":             {root, file("/tmp/evil")},
		"through a link":       {root, link("./out", ".."), file("./out/evil")},
		"through a deep link":  {root, link("./out", "../../.."), file("./out/evil")},
		"through an abs. link": {root, link("./out", "/tmp"), file("./out/evil")},
		"root is a link":       {link(".", ".."), file("./evil")},
		"root comes late":      {file("./a"), root},
		"root comes twice":     {root, root},
		"device":               {root, {Name: "./dev", Typeflag: tar.TypeChar}},
		"hard link":            {root, {Name: "./h", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}},
		"nothing":              {},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			target := filepath.Join(dir, "in", "target")
			if err := os.Mkdir(filepath.Dir(target), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := Extract(stream(t, headers...), Target{Path: target, Name: "t"}); err == nil {
				t.Error("it is taken")
			}
			for _, path := range []string{dir + "/evil", dir + "/in/evil", filepath.Dir(dir) + "/evil", "/tmp/evil"} {
				if _, err := os.Lstat(path); err == nil {
					t.Errorf("%s is there", path)
				}
			}
		})
	}
}

func TestSetID(t *testing.T) {
	for keep, want := range map[bool]fs.FileMode{false: 0o755, true: 0o755 | fs.ModeSetuid} {
		path := filepath.Join(t.TempDir(), "f")
		err := Extract(stream(t, tar.Header{Name: ".", Typeflag: tar.TypeReg, Mode: 0o4755}), Target{Path: path, KeepSetID: keep})
		if info, statErr := os.Stat(path); err != nil || statErr != nil || info.Mode() != want {
			t.Errorf("keep %v: mode %v, %v, %v", keep, info.Mode(), err, statErr)
		}
	}
}

// A stream that ends in the middle of a file leaves no half file.
func TestCutShort(t *testing.T) {
	whole := stream(t, tar.Header{Name: ".", Typeflag: tar.TypeReg, Size: 10_000})
	path := filepath.Join(t.TempDir(), "f")
	if err := Extract(bytes.NewReader(whole.Bytes()[:2000]), Target{Path: path}); err == nil {
		t.Error("it is taken")
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("half a file is left: %v", err)
	}
}

func FuzzExtract(f *testing.F) {
	f.Add(stream(f, tar.Header{Name: ".", Typeflag: tar.TypeDir}, tar.Header{Name: "../x", Typeflag: tar.TypeReg, Size: 1}).Bytes())
	f.Add(stream(f, tar.Header{Name: ".", Typeflag: tar.TypeDir}, tar.Header{Name: "./l", Typeflag: tar.TypeSymlink, Linkname: "/"}).Bytes())
	f.Fuzz(func(t *testing.T, content []byte) {
		dir := t.TempDir()
		inner := filepath.Join(dir, "inner")
		if err := os.Mkdir(inner, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = Extract(bytes.NewReader(content), Target{Path: filepath.Join(inner, "target")})
		for _, look := range []struct {
			dir  string
			most int
		}{{dir, 1}, {inner, 1}} {
			if entries, err := os.ReadDir(look.dir); err != nil || len(entries) > look.most {
				t.Errorf("%s holds %v, %v", look.dir, entries, err)
			}
		}
	})
}
