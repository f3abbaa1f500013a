package deb_test

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

	"github.com/smolvm/smolvm/internal/image/deb"
	"github.com/smolvm/smolvm/internal/image/deb/debtest"
)

func read(content []byte) (*deb.Package, error) {
	return deb.Read(bytes.NewReader(content), int64(len(content)))
}

// names lists the files of a package.
func names(t *testing.T, p *deb.Package) []string {
	t.Helper()
	data, err := p.Data()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = data.Close() }()
	archive := tar.NewReader(data)
	var list []string
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, header.Name)
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	p, err := read(debtest.Package{
		Name: "some-thing", Info: map[string]string{"postinst": "#!/bin/sh\n", "conffiles": "/etc/thing\n"},
		Entries: []debtest.Entry{debtest.Dir("./"), debtest.Dir("./etc/"), debtest.File("./etc/thing", "x")},
	}.Bytes(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Control.Get("package"); got != "some-thing" {
		t.Errorf("the package is %q", got)
	}
	if got := p.Control.Get("Description"); got != "a package\n for tests" {
		t.Errorf("the description is %q", got)
	}
	if len(p.Info) != 2 || string(p.Info["postinst"]) != "#!/bin/sh\n" {
		t.Errorf("the control archive has %q", p.Info)
	}
	if got := strings.Join(names(t, p), " "); got != "./ ./etc/ ./etc/thing" {
		t.Errorf("the files are %q", got)
	}
}

// What dpkg-deb makes is read, however it is packed.
func TestReadPacked(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip("dpkg-deb is not on this host")
	}
	tree := t.TempDir()
	for name, text := range map[string]string{"DEBIAN/control": debtest.Control("packed", ""), "usr/share/thing": strings.Repeat("much of the same\n", 1<<16)} {
		path := filepath.Join(tree, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, packed := range []string{"none", "gzip", "xz", "zstd"} {
		path := filepath.Join(t.TempDir(), "packed.deb")
		out, err := exec.CommandContext(t.Context(), "dpkg-deb", "--root-owner-group", "-Z"+packed, "--build", tree, path).CombinedOutput()
		if err != nil && strings.Contains(string(out), "zstd") {
			continue // dpkg knows it since 1.21.18, and some distributions for longer
		}
		if err != nil {
			t.Fatalf("%s: %v: %s", packed, err, out)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		p, err := read(content)
		if err != nil {
			t.Errorf("%s: %v", packed, err)
			continue
		}
		if got := strings.Join(names(t, p), " "); got != "./ ./usr/ ./usr/share/ ./usr/share/thing" {
			t.Errorf("%s: the files are %q", packed, got)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	whole := debtest.Package{Name: "thing", Entries: []debtest.Entry{debtest.Dir("./")}}.Bytes(t)
	control := func(text string) []byte { return debtest.Package{Name: "thing", Control: text}.Bytes(t) }
	members := func(first, second, third string) []byte {
		tarball := debtest.Tar(t, []debtest.Entry{debtest.File("control", debtest.Control("thing", ""))})
		return debtest.Archive(map[string][]byte{"1" + first: []byte("2.0\n"), "2" + second: tarball, "3" + third: tarball})
	}
	many := map[string]string{}
	for i := range 400 {
		many[strings.Repeat("a", i%50+1)+strings.Repeat("b", i/50+1)] = ""
	}
	for what, test := range map[string]struct {
		content []byte
		want    string
	}{
		"nothing":             {nil, "does not begin"},
		"no archive":          {[]byte("PK\x03\x04 and so on"), "does not begin"},
		"cut in a header":     {whole[:40], "cut short"},
		"cut in a member":     {whole[:len(whole)-600], "cut short"},
		"damaged header":      {bytes.Replace(whole, []byte("`\n"), []byte("xx"), 1), "damaged header"},
		"negative size":       {bytes.Replace(whole, []byte("4         `"), []byte("-4        `"), 1), "damaged header"},
		"not Debian's":        {members("something", "control.tar", "data.tar"), "debian-binary"},
		"no control":          {members("debian-binary", "other", "data.tar"), "no control archive"},
		"no data":             {members("debian-binary", "control.tar", "other"), "no data"},
		"unknown packing":     {members("debian-binary", "control.tar.rar", "data.tar"), "not known"},
		"packed otherwise":    {members("debian-binary", "control.tar.gz", "data.tar"), "control.tar.gz"},
		"another format":      {bytes.Replace(whole, []byte("2.0\n"), []byte("3.0\n"), 1), "format"},
		"name of a path":      {control(debtest.Control("../../etc", "")), "no name of a package"},
		"no name":             {control("Version: 1\nArchitecture: all\n"), "no name of a package"},
		"version of a path":   {control("Package: thing\nVersion: 1/../2\nArchitecture: all\n"), "no version"},
		"arch of a path":      {control("Package: thing\nVersion: 1\nArchitecture: ../all\n"), "no architecture"},
		"a status of its own": {control("Status: install ok installed\n" + debtest.Control("thing", "")), "database"},
		"two paragraphs":      {control(debtest.Control("thing", "") + "\n" + debtest.Control("other", "")), "paragraphs"},
		"a field twice":       {control(debtest.Control("thing", "") + "Version: 2\n"), "twice"},
		"no field":            {control("what is this\n"), "no field"},
		"file in a folder":    {debtest.Package{Name: "thing", Info: map[string]string{"sub/postinst": ""}}.Bytes(t), "no control archive has"},
		"file outside":        {debtest.Package{Name: "thing", Info: map[string]string{"../postinst": ""}}.Bytes(t), "no control archive has"},
		"list of its own":     {debtest.Package{Name: "thing", Info: map[string]string{"list": "/etc/shadow\n"}}.Bytes(t), "no control archive has"},
		"too many files":      {debtest.Package{Name: "thing", Info: many}.Bytes(t), "more than"},
		"large control file":  {debtest.Package{Name: "thing", Info: map[string]string{"templates": strings.Repeat("x", 33<<20)}}.Bytes(t), "larger"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			_, err := read(test.content)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the error is %v, and should have %q", err, test.want)
			}
		})
	}
}

func FuzzRead(f *testing.F) {
	f.Add(debtest.Package{
		Name: "thing", Info: map[string]string{"conffiles": "/etc/x\n"},
		Entries: []debtest.Entry{debtest.Dir("./"), debtest.File("./etc/x", "x"), debtest.Link("./a", "b")},
	}.Bytes(f))
	f.Add(debtest.Archive(map[string][]byte{"1debian-binary": []byte("2.0\n"), "2control.tar.gz": {0x1f, 0x8b}, "3data.tar.xz": {0xfd}}))
	f.Fuzz(func(t *testing.T, content []byte) {
		p, err := read(content)
		if err != nil {
			return
		}
		if !deb.IsName(p.Control.Get("Package")) || strings.ContainsAny(p.Control.Get("Version"), "/\n") {
			t.Errorf("it is of package %q, version %q", p.Control.Get("Package"), p.Control.Get("Version"))
		}
		again, err := deb.ParseParagraph(p.Control.String())
		if err != nil || len(again) != len(p.Control) {
			t.Errorf("its control reads as %v (%v) when it is written", again, err)
		}
		if data, err := p.Data(); err == nil {
			_, _ = io.Copy(io.Discard, io.LimitReader(data, 1<<20))
			_ = data.Close()
		}
	})
}
