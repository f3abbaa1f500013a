package changes_test

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm/internal/changes"
)

// entry is an entry of a guest's archive.
type entry struct {
	name, text, link string
	kind             byte
	mode             int64
}

func archiveOf(t testing.TB, entries ...entry) changes.Archive {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if e.mode == 0 {
			e.mode = 0o644
		}
		header := &tar.Header{Name: e.name, Linkname: e.link, Typeflag: e.kind, Mode: e.mode, Size: int64(len(e.text)), ModTime: time.Unix(1e9, 0)}
		if err := w.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return changes.Archive{File: bytes.NewReader(b.Bytes()), Size: int64(b.Len())}
}

func file(name, text string) entry   { return entry{name: name, text: text, kind: tar.TypeReg} }
func directory(name string) entry    { return entry{name: name + "/", kind: tar.TypeDir, mode: 0o755} }
func link(name, to string) entry     { return entry{name: name, link: to, kind: tar.TypeSymlink} }
func hardLink(name, to string) entry { return entry{name: name, link: to, kind: tar.TypeLink} }

// host makes a directory of the host, beside a secret.
func host(t testing.TB) (dir string, root *os.Root) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "dir")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "sub", "deep"), 0o755),
		os.WriteFile(filepath.Join(dir, "a"), []byte("a"), 0o644),
		os.WriteFile(filepath.Join(dir, "sub", "b"), []byte("b"), 0o644),
		os.WriteFile(filepath.Join(dir, "sub", "deep", "c"), []byte("c"), 0o644),
		os.Symlink("a", filepath.Join(dir, "l")),
		os.Symlink("..", filepath.Join(dir, "up")),
		os.WriteFile(filepath.Join(filepath.Dir(dir), "secret"), []byte("secret"), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() })
	return dir, root
}

func TestChanges(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		archive []entry
		changes string
		after   map[string]string // content by path; "" for what is not there
	}{
		"nothing":        {nil, "", nil},
		"the same":       {[]entry{directory("sub"), file("sub/b", "b"), link("l", "a"), file("a", "a")}, "", nil},
		"changed":        {[]entry{file("a", "new")}, "C a", map[string]string{"a": "new"}},
		"mode":           {[]entry{{name: "a", text: "a", kind: tar.TypeReg, mode: 0o755}}, "C a", map[string]string{"a": "a"}},
		"added":          {[]entry{directory("new"), file("new/f", "f"), link("new/l", "f")}, "A new,A new/f,A new/l", map[string]string{"new/l": "f"}},
		"deleted":        {[]entry{file(".wh.a", ""), directory("sub"), file("sub/.wh.deep", "")}, "D a,D sub/deep", map[string]string{"a": "", "sub/deep": "", "sub/b": "b"}},
		"deleted before": {[]entry{file(".wh.nothing", "")}, "", nil},
		"made anew":      {[]entry{directory("sub"), file("sub/.wh..wh..opq", ""), file("sub/b", "b")}, "D sub/deep", map[string]string{"sub/b": "b", "sub/deep": ""}},
		"file to dir":    {[]entry{directory("a"), file("a/x", "x")}, "C a,A a/x", map[string]string{"a/x": "x"}},
		"dir to file":    {[]entry{file("sub", "s")}, "C sub", map[string]string{"sub": "s"}},
		"link to dir":    {[]entry{directory("up"), file("up/x", "x")}, "C up,A up/x", map[string]string{"up/x": "x", "../x": ""}},
		"hard link":      {[]entry{file("n", "n"), hardLink("m", "n")}, "A m,A n", map[string]string{"m": "n"}},
		"of the same":    {[]entry{hardLink("m", "a"), hardLink("a", "a")}, "A m", map[string]string{"m": "a", "a": "a"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, root := host(t)
			archive := archiveOf(t, test.archive...)
			plan, err := changes.Scan(t.Context(), archive, root, changes.Options{Since: time.Now().Add(time.Hour)})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range plan.Changes {
				got = append(got, c.String())
			}
			if diff := cmp.Diff(test.changes, strings.Join(got, ",")); diff != "" {
				t.Error(diff)
			}
			if err := changes.Apply(t.Context(), archive, root, plan); err != nil {
				t.Fatal(err)
			}
			for path, want := range test.after {
				text, err := os.ReadFile(filepath.Join(dir, path))
				if want == "" && !os.IsNotExist(err) || want != "" && string(text) != want {
					t.Errorf("%s is %q (%v), want %q", path, text, err, want)
				}
			}
			// What was applied is no change any more.
			if plan, err = changes.Scan(t.Context(), archive, root, changes.Options{Since: time.Now()}); err != nil || len(plan.Changes) > 0 {
				t.Errorf("afterwards there are %v, %v", plan.Changes, err)
			}
			if found, err := filepath.Glob(filepath.Join(dir, ".smolvm*")); err != nil || len(found) > 0 {
				t.Errorf("%v, %v", found, err)
			}
		})
	}
}

// What has changed on the host since is not lost unnoticed.
func TestConflicts(t *testing.T) {
	t.Parallel()
	_, root := host(t)
	archive := archiveOf(t, file("a", "guest"), file(".wh.sub", ""), file("new", "new"), directory("sub2"))
	plan, err := changes.Scan(t.Context(), archive, root, changes.Options{Since: time.Now().Add(-time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", "sub", "sub/b", "sub/deep", "sub/deep/c"}, plan.Conflicts); diff != "" {
		t.Error(diff)
	}
}

// Nothing that a guest sends reaches what is outside of the directory.
func TestHostileArchives(t *testing.T) {
	t.Parallel()
	for name, entries := range map[string][]entry{
		"above":               {file("../secret", "x")},
		"in the middle":       {file("sub/../../secret", "x")},
		"absolute":            {file("/etc/passwd", "x")},
		"through a link":      {file("up/secret", "x")},
		"through a new link":  {link("n", ".."), file("n/secret", "x")},
		"delete above":        {file("up/.wh.secret", "")},
		"delete parent":       {file(".wh...", "")},
		"delete itself":       {file(".wh..", "")},
		"delete nothing":      {file("sub/.wh.", "")},
		"hard link to above":  {hardLink("n", "../secret")},
		"hard link by a link": {hardLink("n", "up/secret")},
		"made anew above":     {file("up/.wh..wh..opq", "")},
		"device":              {{name: "null", kind: tar.TypeChar}},
		"set-id":              {{name: "suid", kind: tar.TypeReg, mode: 0o6755}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, root := host(t)
			archive := archiveOf(t, entries...)
			plan, err := changes.Scan(t.Context(), archive, root, changes.Options{Since: time.Now().Add(time.Hour)})
			if err == nil {
				err = changes.Apply(t.Context(), archive, root, plan)
			}
			if text, readErr := os.ReadFile(filepath.Join(filepath.Dir(dir), "secret")); readErr != nil || string(text) != "secret" {
				t.Errorf("the secret is %q, %v", text, readErr)
			}
			if entries, readErr := os.ReadDir(filepath.Dir(dir)); readErr != nil || len(entries) != 2 {
				t.Errorf("outside there are %v, %v", entries, readErr)
			}
			if text, readErr := os.ReadFile(filepath.Join(dir, "sub", "b")); readErr != nil || string(text) != "b" {
				t.Errorf("what nobody named is %q, %v", text, readErr)
			}
			info, statErr := os.Stat(filepath.Join(dir, "suid"))
			if name != "set-id" && err == nil || name == "set-id" && (err != nil || statErr != nil || info.Mode()&os.ModeSetuid != 0) {
				t.Error(err, statErr)
			}
		})
	}
}
