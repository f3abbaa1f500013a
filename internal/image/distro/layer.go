package distro

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/md5" // dpkg's database has MD5 sums of configuration files
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/smolvm/smolvm/internal/image/deb"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/image/readahead"
	"github.com/smolvm/smolvm/internal/ocitar"
)

// Limits bound what packages may make when they are unpacked. Zeros stand for the defaults.
type Limits struct {
	// Entries is how many files all packages may have together. Default:
	// [ocilayer.DefaultEntries].
	Entries int
	// Bytes is how many bytes all archives may have together when they are unpacked. Default:
	// [ocilayer.DefaultBytes].
	Bytes int64
}

// ErrLimit reports that packages make more than they may.
var ErrLimit = errors.New("more than an image may have")

// File is a file that an image has beside those of packages.
type File struct {
	Path    string // absolute
	Mode    int64
	Content string
}

// Unpacked is a package that was unpacked.
type Unpacked struct {
	Name string
	// HasPreinst reports whether it has a script that is to be run before it is configured.
	HasPreinst bool
}

// maxPath is how long a path may be, or what a link leads to, in bytes.
const maxPath = 4095

// kind tells what is at a path of the layer.
type kind byte

const (
	dirKind kind = iota + 1
	linkKind
	fileKind // all others
)

// entry is what is at a path of the layer.
type entry struct {
	kind  kind
	owner *installed // nil: of no package, or of several
}

// installed is a package as dpkg's database has it.
type installed struct {
	*deb.Package

	paths     []string          // as the package has them, without a leading slash
	gone      map[string]bool   // those that others have taken over, as they are in the layer
	conffiles map[string]string // with their MD5 sums, which are empty until they are known
	// sums are the MD5 sums of the other files, of a package that has no list of them: dpkg makes
	// one then.
	sums *strings.Builder
}

func (i *installed) name() string { return i.Control.Get("Package") }

// layer is the archive of a layer in the making.
type layer struct {
	out      *tar.Writer
	limits   Limits
	entries  map[string]entry // by their path without a leading slash
	packages []*installed
}

// WriteLayer unpacks packages to the archive of a layer: their files, with the links that a
// merged /usr has, and a database in which dpkg finds each of them unpacked, so that
// `dpkg --configure --pending` in a guest does what is left. Nothing of a package is run. A file
// of several packages is taken by the rules of dpkg: one of them has to replace the other.
// Documents are left out, as dpkg in the guest is told to do as well. Packages are unpacked in
// the order of their files' names in debs, and done is called after each; it may be nil.
func WriteLayer(ctx context.Context, w io.Writer, debs []string, files []File, limits Limits, done func(count int)) ([]Unpacked, error) {
	limits.Entries = cmp.Or(limits.Entries, ocilayer.DefaultEntries)
	limits.Bytes = cmp.Or(limits.Bytes, ocilayer.DefaultBytes)
	l := &layer{out: tar.NewWriter(w), limits: limits, entries: map[string]entry{}}
	for _, name := range []string{"bin", "sbin", "lib"} {
		if err := l.mergeUsr(name); err != nil {
			return nil, err
		}
	}
	for i, path := range debs {
		if err := l.addFile(ctx, path); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", filepath.Base(path), err)
		}
		if done != nil {
			done(i + 1)
		}
	}
	if err := l.writeDatabase(); err != nil {
		return nil, fmt.Errorf("write dpkg's database: %w", err)
	}
	for _, file := range files {
		if err := l.writeFile(file.Path, file.Mode, []byte(file.Content)); err != nil {
			return nil, fmt.Errorf("write %s: %w", file.Path, err)
		}
	}
	var unpacked []Unpacked
	for _, p := range l.packages {
		unpacked = append(unpacked, Unpacked{Name: p.name(), HasPreinst: p.Info["preinst"] != nil})
	}
	return unpacked, l.out.Close()
}

// merged reports whether a directory of the root is part of /usr.
func merged(name string) bool {
	switch name {
	case "bin", "sbin", "lib", "lib32", "lib64", "libo32", "libx32":
		return true
	}
	return false
}

// mergeUsr makes the link by which a directory of the root is part of /usr, unless it is there.
func (l *layer) mergeUsr(name string) error {
	if _, ok := l.entries[name]; ok {
		return nil
	}
	l.entries[name] = entry{kind: linkKind}
	return l.out.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: "usr/" + name, Mode: 0o777})
}

func (l *layer) addFile(ctx context.Context, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	opened, err := deb.Read(file, info.Size())
	if err != nil {
		return err
	}
	return l.add(ctx, opened)
}

func (l *layer) add(ctx context.Context, opened *deb.Package) error {
	p := &installed{Package: opened, gone: map[string]bool{}}
	for _, other := range l.packages {
		if other.name() == p.name() {
			return errors.New("another version of it is unpacked already")
		}
	}
	var err error
	if p.conffiles, err = readConffiles(opened.Info["conffiles"]); err != nil {
		return err
	}
	if opened.Info["md5sums"] == nil {
		p.sums = &strings.Builder{}
	}
	l.packages = append(l.packages, p)
	data, err := opened.Data()
	if err != nil {
		return err
	}
	defer func() { _ = data.Close() }()
	// It is unpacked ahead, as that and what follows take about as long as each other.
	ahead := readahead.New(ctx, data)
	defer ahead.Stop()
	archive := tar.NewReader(&limited{r: ahead, left: &l.limits.Bytes})
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if l.limits.Entries--; l.limits.Entries < 0 {
			return fmt.Errorf("the packages have more files: %w", ErrLimit)
		}
		if err := l.put(p, header, archive); err != nil {
			return fmt.Errorf("%.300q: %w", header.Name, err)
		}
	}
}

// limited is a reader that reads no more than there may be.
type limited struct {
	r    io.Reader
	left *int64
}

func (r *limited) Read(b []byte) (int, error) {
	n, err := r.r.Read(b)
	if *r.left -= int64(n); *r.left < 0 {
		return 0, fmt.Errorf("unpacked, the packages have %w", ErrLimit)
	}
	return n, err
}

// put writes an entry of a package to the layer.
func (l *layer) put(p *installed, header *tar.Header, content io.Reader) error {
	original, err := cleanPath(header.Name)
	if err != nil {
		return err
	}
	p.paths = append(p.paths, original)
	if original == "." {
		return nil
	}
	name, err := l.locate(original)
	if err != nil {
		return err
	}
	if header.Typeflag != tar.TypeDir && leftOut("/"+name) {
		return nil
	}
	write, err := l.claim(p, name, header.Typeflag)
	if err != nil || !write {
		return err
	}
	out := &tar.Header{
		Typeflag: header.Typeflag, Name: name, Linkname: header.Linkname, Mode: header.Mode & 0o7777,
		Uid: header.Uid, Gid: header.Gid, Size: header.Size, ModTime: header.ModTime,
		Devmajor: header.Devmajor, Devminor: header.Devminor,
	}
	switch header.Typeflag {
	case tar.TypeReg:
		return l.copyFile(p, "/"+original, out, content)
	case tar.TypeDir:
		out.Name += "/"
	case tar.TypeLink:
		return l.hardLink(out)
	case tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		return fmt.Errorf("is an entry of type %q, which no package has", header.Typeflag)
	}
	if len(header.Linkname) > maxPath {
		return errors.New("what the link leads to is too long")
	}
	return l.out.WriteHeader(out)
}

// locate returns where a path of a package is in the layer, where /usr is merged.
func (l *layer) locate(name string) (string, error) {
	top, _, _ := strings.Cut(name, "/")
	if !merged(top) {
		return name, nil
	}
	if err := l.mergeUsr(top); err != nil {
		return "", err
	}
	return inMergedUsr(name), nil
}

// inMergedUsr returns where a path is if /usr is merged. Links that a package has in the root are
// its own.
func inMergedUsr(name string) string {
	if top, _, inside := strings.Cut(name, "/"); inside && merged(top) {
		return "usr/" + name
	}
	return name
}

// cleanPath returns a path of a package without a leading ./ or slash.
func cleanPath(name string) (string, error) {
	cleaned := strings.TrimPrefix(path.Clean("/"+name), "/")
	if cleaned == "" {
		return ".", nil
	}
	if len(cleaned) > maxPath || strings.ContainsAny(cleaned, "\x00\n") {
		return "", errors.New("is no name that dpkg can keep")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." || strings.HasPrefix(part, ocitar.Whiteout) {
			return "", errors.New("is a name that a package must not have")
		}
	}
	return cleaned, nil
}

// claim decides what becomes of a path that a package has, and reports whether its entry is to be
// written.
func (l *layer) claim(p *installed, name string, flag byte) (bool, error) {
	found, exists := l.entries[name]
	if flag == tar.TypeDir {
		switch {
		case !exists:
			l.entries[name] = entry{kind: dirKind}
			return true, nil
		case found.kind == fileKind:
			return false, fmt.Errorf("is a directory, and a file of %s", ownerName(found))
		}
		// A directory stays as the first package has it, and so does a link to one.
		return false, nil
	}
	made := entry{kind: fileKind, owner: p}
	if flag == tar.TypeSymlink {
		made.kind = linkKind
	}
	switch {
	case !exists:
	case merged(name), found.kind == dirKind && flag == tar.TypeSymlink:
		return false, nil // dpkg replaces no directory by a link
	case found.kind == dirKind:
		return false, errors.New("is a file, and a directory of another package")
	case found.owner == p:
	case found.owner != nil && replaces(p, found.owner):
		found.owner.gone[name] = true
	case found.owner != nil && replaces(found.owner, p):
		p.gone[name] = true
		return false, nil
	default:
		return false, fmt.Errorf("is a file of %s, too", ownerName(found))
	}
	l.entries[name] = made
	return true, nil
}

func ownerName(e entry) string {
	if e.owner == nil {
		return "the image"
	}
	return "package " + e.owner.name()
}

// replaces reports whether a package may take over files of another. Versions make no
// difference here: apt has chosen packages that go together.
func replaces(p, other *installed) bool {
	for relation := range strings.SplitSeq(p.Control.Get("Replaces"), ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(relation), " ")
		name, _, _ = strings.Cut(name, ":")
		if name, _, _ = strings.Cut(name, "("); name == other.name() {
			return true
		}
	}
	return false
}

func (l *layer) hardLink(out *tar.Header) error {
	target, err := cleanPath(out.Linkname)
	if err != nil {
		return fmt.Errorf("link to %.300q: %w", out.Linkname, err)
	}
	if out.Linkname, err = l.locate(target); err != nil {
		return err
	}
	if l.entries[out.Linkname].kind != fileKind {
		return fmt.Errorf("is a hard link to %.300q, which is no file of a package", target)
	}
	out.Size = 0
	return l.out.WriteHeader(out)
}

// copyFile writes a file, and notes its sum if it is one of configuration. dpkg unpacks those
// beside the place where they belong, and moves them there when it configures a package that was
// not there before; here they are there at once.
func (l *layer) copyFile(p *installed, original string, out *tar.Header, content io.Reader) error {
	if err := l.out.WriteHeader(out); err != nil {
		return err
	}
	_, isConffile := p.conffiles[original]
	if !isConffile && p.sums == nil {
		_, err := io.Copy(l.out, content)
		return err
	}
	sum := md5.New()
	if _, err := io.Copy(io.MultiWriter(l.out, sum), content); err != nil {
		return err
	}
	text := hex.EncodeToString(sum.Sum(nil))
	if isConffile {
		p.conffiles[original] = text
	} else {
		p.sums.WriteString(text + "  " + strings.TrimPrefix(original, "/") + "\n")
	}
	return nil
}

// readConffiles reads a package's list of configuration files.
func readConffiles(text []byte) (map[string]string, error) {
	files := map[string]string{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "remove-on-upgrade ") {
			continue
		}
		if !path.IsAbs(line) || path.Clean(line) != line {
			return nil, fmt.Errorf("conffiles: %.300q is no path of a file", line)
		}
		files[line] = ""
	}
	return files, nil
}

// writeFile writes a file that is of no package.
func (l *layer) writeFile(name string, mode int64, content []byte) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(name, "/"), Mode: mode, Size: int64(len(content))}
	if err := l.out.WriteHeader(header); err != nil {
		return err
	}
	_, err := l.out.Write(content)
	return err
}
