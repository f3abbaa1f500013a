package distro_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/image/deb/debtest"
	"github.com/smolvm/smolvm/internal/image/distro"
)

// found is an entry of a layer.
type found struct {
	header  *tar.Header
	content string
}

// unpack unpacks packages, and returns the layer's entries by name; a later one counts.
func unpack(t *testing.T, limits distro.Limits, files []distro.File, packages ...debtest.Package) (map[string]found, error) {
	t.Helper()
	dir := t.TempDir()
	var debs []string
	for _, p := range packages {
		debs = append(debs, p.Write(t, dir))
	}
	var layer bytes.Buffer
	if _, err := distro.WriteLayer(t.Context(), &layer, debs, files, limits, nil); err != nil {
		return nil, err
	}
	entries := map[string]found{}
	archive := tar.NewReader(&layer)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		content, readErr := io.ReadAll(archive)
		if err := errors.Join(err, readErr); err != nil {
			t.Fatal(err)
		}
		entries[header.Name] = found{header, string(content)}
	}
}

func TestWriteLayer(t *testing.T) {
	t.Parallel()
	base := debtest.Package{
		Name: "base",
		Info: map[string]string{
			"conffiles": "/etc/base.conf\nremove-on-upgrade /etc/old.conf\n", "preinst": "#!/bin/sh\n",
			"triggers": "# of whom\ninterest /usr/lib/x\ninterest-noawait ldconfig # later\nactivate other\n",
		},
		Entries: []debtest.Entry{
			debtest.Dir("./"), debtest.Dir("./etc/"), debtest.File("./etc/base.conf", "yes\n"), debtest.Dir("./tmp/"),
			debtest.Dir("./bin/"), debtest.File("./bin/tool", "tool"), debtest.Dir("./usr/"), debtest.Dir("./usr/share/"),
			debtest.Dir("./usr/share/doc/"), debtest.File("./usr/share/doc/README", "read"), debtest.Dir("./usr/share/doc/base/"), debtest.File("./usr/share/doc/base/copyright", "(c)"),
			debtest.Dir("./usr/share/man/"), debtest.Dir("./usr/share/man/man1/"), debtest.File("./usr/share/man/man1/tool.1.gz", "man"),
		},
	}
	base.Entries[3].Mode, base.Entries[5].Mode, base.Entries[5].Uid = 0o1777, 0o4755, 7
	lib := debtest.Package{
		Name: "lib", Control: debtest.Control("lib", "Multi-Arch: same\n"), Info: map[string]string{"postinst": "#!/bin/sh\n", "triggers": "interest-await /usr/lib/y\n"},
		Entries: []debtest.Entry{
			debtest.Dir("./"), debtest.Dir("./lib64/"), debtest.File("./lib64/ld.so", "elf"), debtest.Dir("./tmp/"),
			debtest.Link("./usr/lib/tool", "../bin/tool"), {Header: tar.Header{Typeflag: tar.TypeLink, Name: "./usr/bin/again", Linkname: "./lib64/ld.so"}},
		},
	}
	entries, err := unpack(t, distro.Limits{}, []distro.File{{Path: "/etc/mine", Mode: 0o640, Content: "mine"}}, base, lib)
	if err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/lib/tool": "../bin/tool", "usr/bin/again": "usr/lib64/ld.so"} {
		if e, ok := entries[name]; !ok || e.header.Linkname != to {
			t.Errorf("%s is %+v, and no link to %s", name, e.header, to)
		}
	}
	for name, content := range map[string]string{
		"etc/base.conf": "yes\n", "usr/bin/tool": "tool", "usr/lib64/ld.so": "elf", "etc/mine": "mine", "usr/share/doc/base/copyright": "(c)",
		"var/lib/dpkg/info/base.preinst": "#!/bin/sh\n", "var/lib/dpkg/info/lib:amd64.postinst": "#!/bin/sh\n", "var/lib/dpkg/info/format": "1\n",
		// As dpkg makes it where a package has none, without files of configuration.
		"var/lib/dpkg/info/lib:amd64.md5sums": "aab4b125bca447f96d4fe7920863a1ed  lib64/ld.so\n",
		"var/lib/dpkg/triggers/File":          "/usr/lib/x base\n/usr/lib/y lib:amd64\n", "var/lib/dpkg/triggers/ldconfig": "base/noawait\n",
		"var/lib/dpkg/info/lib:amd64.list": "/.\n/lib64\n/lib64/ld.so\n/tmp\n/usr/lib/tool\n/usr/bin/again\n",
	} {
		if e, ok := entries[name]; !ok || e.content != content {
			t.Errorf("%s is %q, want %q", name, e.content, content)
		}
	}
	for _, name := range []string{"bin/tool", "usr/share/doc/README", "usr/share/man/man1/tool.1.gz", "var/lib/dpkg/triggers/other", "var/lib/dpkg/info/base.control"} {
		if _, ok := entries[name]; ok {
			t.Errorf("%s is there", name)
		}
	}
	if e := entries["tmp/"].header; e == nil || e.Mode != 0o1777 {
		t.Errorf("/tmp is %+v, and not as its first package has it", e)
	}
	if e := entries["usr/bin/tool"].header; e.Mode != 0o4755 || e.Uid != 7 {
		t.Errorf("the tool is %+v", e)
	}
	if e := entries["var/lib/dpkg/info/base.preinst"].header; e.Mode != 0o755 {
		t.Errorf("the script is %+v", e)
	}
	if _, ok := entries["usr/share/man/man1/"]; !ok {
		t.Error("the directory of manuals is left out, in which scripts make links")
	}
	if list := entries["var/lib/dpkg/info/base.list"].content; !strings.Contains(list, "/usr/share/doc/README\n") {
		t.Errorf("the list lacks what dpkg would have left out too: %q", list)
	}
	if status := entries["var/lib/dpkg/status"].content; !strings.Contains(status, "Conffiles:\n /etc/base.conf eb4585ad9fe0426781ed7c49252f8225\n") {
		t.Errorf("the status is %q", status)
	}
}

// dpkg reads the database that was written, and finds in it what it would have there itself.
func TestDatabaseForDpkg(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("dpkg-query"); err != nil {
		t.Skip("dpkg-query is not on this host")
	}
	entries, err := unpack(t, distro.Limits{}, nil,
		debtest.Package{Name: "one", Info: map[string]string{"conffiles": "/etc/one\n"}, Entries: []debtest.Entry{debtest.Dir("./"), debtest.Dir("./etc"), debtest.File("./etc/one", "1")}},
		debtest.Package{Name: "two", Control: debtest.Control("two", "Multi-Arch: same\nDepends: one\n"), Entries: []debtest.Entry{debtest.Dir("./"), debtest.File("./bin/two", "2")}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, e := range entries {
		path := filepath.Join(dir, name)
		if inside := strings.HasPrefix(name, "var/lib/dpkg/"); !inside {
			continue
		}
		if e.header.Typeflag == tar.TypeDir {
			err = os.MkdirAll(path, 0o755)
		} else {
			err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(e.content), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	query := func(args ...string) string {
		out, err := exec.CommandContext(t.Context(), "dpkg-query", append([]string{"--admindir=" + filepath.Join(dir, "var/lib/dpkg")}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("dpkg-query %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	if got := query("-W", "-f", "${binary:Package} ${db:Status-Status} ${Version}${Conffiles}\n"); got != "one unpacked 1.0-1 /etc/one c4ca4238a0b923820dcc509a6f75849b\ntwo:amd64 unpacked 1.0-1\n" {
		t.Errorf("dpkg-query lists %q", got)
	}
	if got := query("-L", "two"); got != "/.\n/bin/two\n" {
		t.Errorf("package two has %q", got)
	}
	if got := query("-S", "/etc/one"); got != "one: /etc/one\n" {
		t.Errorf("/etc/one is of %q", got)
	}
}

// A file of two packages is that of the one that replaces the other, in either order.
func TestReplaces(t *testing.T) {
	t.Parallel()
	old := debtest.Package{Name: "old", Entries: []debtest.Entry{debtest.File("./bin/tool", "old"), debtest.File("./bin/rest", "rest")}}
	taking := debtest.Package{Name: "taking", Control: debtest.Control("taking", "Replaces: something, old (<< 2:3), new\n"), Entries: []debtest.Entry{debtest.File("./usr/bin/tool", "new")}}
	for what, packages := range map[string][]debtest.Package{"first": {old, taking}, "last": {taking, old}} {
		entries, err := unpack(t, distro.Limits{}, nil, packages...)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if got := entries["usr/bin/tool"].content; got != "new" {
			t.Errorf("%s: the tool is the %s one", what, got)
		}
		if got := entries["var/lib/dpkg/info/old.list"].content; got != "/bin/rest\n" {
			t.Errorf("%s: the replaced package still has %q", what, got)
		}
	}
	other := debtest.Package{Name: "other", Entries: taking.Entries}
	if _, err := unpack(t, distro.Limits{}, nil, old, other); err == nil || !strings.Contains(err.Error(), "package old") {
		t.Errorf("two packages have one file: %v", err)
	}
}

func TestWriteLayerRefuses(t *testing.T) {
	t.Parallel()
	entry := func(flag byte, name, link string) debtest.Entry {
		return debtest.Entry{Header: tar.Header{Typeflag: flag, Name: name, Linkname: link}}
	}
	of := func(entries ...debtest.Entry) []debtest.Package {
		return []debtest.Package{{Name: "thing", Entries: entries}}
	}
	for what, test := range map[string]struct {
		packages []debtest.Package
		limits   distro.Limits
		want     string
	}{
		"path that leads up":      {of(debtest.File("./usr/../../etc/passwd", "")), distro.Limits{}, "must not have"},
		"whiteout":                {of(debtest.File("./etc/.wh.passwd", "")), distro.Limits{}, "must not have"},
		"opaque directory":        {of(debtest.File("./etc/.wh..wh..opq", "")), distro.Limits{}, "must not have"},
		"name with a line's end":  {of(debtest.File("./etc/a\nb", "")), distro.Limits{}, "dpkg can keep"},
		"long name":               {of(debtest.File("./"+strings.Repeat("a/", 3000)+"a", "")), distro.Limits{}, "dpkg can keep"},
		"hard link to nothing":    {of(entry(tar.TypeLink, "./a", "./b")), distro.Limits{}, "no file of a package"},
		"hard link up":            {of(entry(tar.TypeLink, "./a", "../../b")), distro.Limits{}, "must not have"},
		"long link":               {of(entry(tar.TypeSymlink, "./a", strings.Repeat("x", 5000))), distro.Limits{}, "too long"},
		"file over a directory":   {of(debtest.Dir("./a"), debtest.File("./a", "")), distro.Limits{}, "directory"},
		"directory over a file":   {of(debtest.File("./a", ""), debtest.Dir("./a")), distro.Limits{}, "file of package thing"},
		"another kind of entry":   {of(entry(tar.TypeCont, "./a", "")), distro.Limits{}, "no package has"},
		"two of one package":      {nil, distro.Limits{}, "unpacked already"},
		"relative conffile":       {[]debtest.Package{{Name: "thing", Info: map[string]string{"conffiles": "etc/../x\n"}}}, distro.Limits{}, "no path of a file"},
		"too many files":          {of(debtest.Dir("./a"), debtest.Dir("./b")), distro.Limits{Entries: 1}, "more than an image may have"},
		"too many bytes":          {of(debtest.File("./a", strings.Repeat("x", 9000))), distro.Limits{Bytes: 8000}, "more than an image may have"},
		"too many bytes together": {[]debtest.Package{{Name: "one", Entries: of(debtest.File("./a", "x"))[0].Entries}, {Name: "two", Entries: of(debtest.File("./b", "x"))[0].Entries}}, distro.Limits{Bytes: 3000}, "more than an image may have"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			if len(test.packages) == 0 {
				test.packages = []debtest.Package{{Name: "thing"}, {Name: "thing"}}
			}
			_, err := unpack(t, test.limits, nil, test.packages...)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the error is %v, and should have %q", err, test.want)
			}
		})
	}
}

// A triggers file can't make dpkg's database have files elsewhere.
func TestTriggersStay(t *testing.T) {
	t.Parallel()
	entries, err := unpack(t, distro.Limits{}, nil, debtest.Package{Name: "thing", Info: map[string]string{
		"triggers": "interest ../status\ninterest File\ninterest Unincorp\ninterest a/b\ninterest fine\n",
	}})
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range entries {
		if strings.HasPrefix(name, "var/lib/dpkg/triggers/") && e.content != "" && name != "var/lib/dpkg/triggers/fine" {
			t.Errorf("%s has %q", name, e.content)
		}
	}
	if got := entries["var/lib/dpkg/triggers/fine"].content; got != "thing\n" {
		t.Errorf("the trigger has %q", got)
	}
}
