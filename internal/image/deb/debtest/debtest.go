// Package debtest makes packages of Debian's format for tests, nasty ones too.
package debtest

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// Entry is a file of a package. Its size follows from Content.
type Entry struct {
	tar.Header

	Content string
}

// File returns an entry of a file.
func File(name, content string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, content}
}

// Dir returns an entry of a directory.
func Dir(name string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

// Link returns an entry of a symbolic link.
func Link(name, to string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}, ""}
}

// Package is a package in the making.
type Package struct {
	// Control is its file control. Empty: of a package with that name.
	Name, Control string
	// Info are the other files of its control archive.
	Info map[string]string
	// Entries are its files.
	Entries []Entry
}

// Bytes returns the package.
func (p Package) Bytes(tb testing.TB) []byte {
	tb.Helper()
	control := p.Control
	if control == "" {
		control = Control(p.Name, "")
	}
	entries := []Entry{File("./control", control)}
	for name, content := range p.Info {
		entries = append(entries, File("./"+name, content))
	}
	return Archive(map[string][]byte{
		"1debian-binary": []byte("2.0\n"), "2control.tar": Tar(tb, entries), "3data.tar": Tar(tb, p.Entries),
	})
}

// Write writes the package to a file in a directory, and returns its path.
func (p Package) Write(tb testing.TB, dir string) string {
	tb.Helper()
	path := filepath.Join(dir, p.Name+".deb")
	if err := os.WriteFile(path, p.Bytes(tb), 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

// Control returns a file control, with more fields at its end.
func Control(name, more string) string {
	return "Package: " + name + "\nVersion: 1.0-1\nArchitecture: amd64\nMaintainer: Nobody <nobody@example.com>\n" +
		more + "Description: a package\n for tests\n"
}

// Tar returns an archive.
func Tar(tb testing.TB, entries []Entry) []byte {
	tb.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		e.Size = int64(len(e.Content))
		err := w.WriteHeader(&e.Header)
		if _, writeErr := w.Write([]byte(e.Content)); errors.Join(err, writeErr) != nil {
			tb.Fatal(e.Name, err, writeErr)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

// Archive returns an archive of ar. The first character of a name is its place, and is left out.
func Archive(members map[string][]byte) []byte {
	var out bytes.Buffer
	out.WriteString("!<arch>\n")
	for place := '1'; place <= '9'; place++ {
		for name, content := range members {
			if rune(name[0]) != place {
				continue
			}
			fmt.Fprintf(&out, "%-16s%-12d%-6d%-6d%-8o%-10d`\n", name[1:], 0, 0, 0, 0o100644, len(content))
			out.Write(content)
			if len(content)%2 == 1 {
				out.WriteByte('\n')
			}
		}
	}
	return out.Bytes()
}
