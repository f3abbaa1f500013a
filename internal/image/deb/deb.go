// Package deb reads packages of Debian's format, without a program of the host and without
// running anything of theirs. Packages are hostile: what is read of one is bounded, and what
// does not look as deb(5) has it is refused.
package deb

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/smolvm/smolvm/internal/image/decompress"
)

const (
	// maxControl bounds the control archive of a package when it is unpacked, in bytes; the
	// largest in Debian has some 3 MB.
	maxControl = 32 << 20
	// maxControlFiles bounds how many files a control archive has.
	maxControlFiles = 256
)

// Package is an open package.
type Package struct {
	// Control is what the package says of itself.
	Control Paragraph
	// Info are the other files of its control archive by name: maintainer scripts, conffiles,
	// md5sums, triggers.
	Info map[string][]byte

	data member
}

// Read reads what a package says of itself, and finds its files.
func Read(r io.ReaderAt, size int64) (*Package, error) {
	members, err := readArchive(r, size)
	if err != nil {
		return nil, err
	}
	if len(members) < 3 || members[0].name != "debian-binary" {
		return nil, errors.New("is not a package: it does not begin with debian-binary")
	}
	version := make([]byte, min(members[0].size, 16))
	if _, err := members[0].ReadAt(version, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if !bytes.HasPrefix(version, []byte("2.")) {
		return nil, fmt.Errorf("is a package of format %.16q, and not 2.0", version)
	}
	p := &Package{Info: map[string][]byte{}}
	control, data := false, false
	for _, m := range members[1:] {
		switch {
		case strings.HasPrefix(m.name, "_"): // by deb(5) to be passed over
		case !control && isTar(m.name, "control"):
			if err := p.readControl(m); err != nil {
				return nil, fmt.Errorf("%s: %w", m.name, err)
			}
			control = true
		case control && !data && isTar(m.name, "data"):
			p.data, data = m, true
		}
	}
	if !control || !data {
		return nil, errors.New("has no control archive, or no data after it")
	}
	return p, nil
}

// isTar reports whether a member is that archive, packed or not.
func isTar(name, archive string) bool {
	return name == archive+".tar" || strings.HasPrefix(name, archive+".tar.")
}

func (p *Package) readControl(m member) error {
	unpacked, err := unpack(m)
	if err != nil {
		return err
	}
	defer func() { _ = unpacked.Close() }()
	archive := tar.NewReader(&bounded{r: unpacked, left: maxControl})
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		name := path.Clean(header.Name)
		if header.Typeflag != tar.TypeReg || name != path.Base(name) || !isInfoName(name) {
			if header.Typeflag == tar.TypeDir {
				continue
			}
			return fmt.Errorf("has %.100q, which no control archive has", header.Name)
		}
		if len(p.Info) > maxControlFiles {
			return fmt.Errorf("has more than %d files", maxControlFiles)
		}
		if p.Info[name], err = io.ReadAll(archive); err != nil {
			return err
		}
	}
	text, ok := p.Info["control"]
	if !ok {
		return errors.New("has no file control")
	}
	delete(p.Info, "control")
	p.Control, err = ParseParagraph(string(text))
	if err != nil {
		return fmt.Errorf("control: %w", err)
	}
	return p.Control.checkPackage()
}

// isInfoName reports whether dpkg can keep a file of that name in its database.
func isInfoName(name string) bool {
	return name != "" && len(name) <= 64 && name != "list" &&
		!strings.ContainsFunc(name, func(r rune) bool { return !isAlphanumeric(r) && r != '-' && r != '_' })
}

func isAlphanumeric(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9'
}

// Data opens the archive of the package's files.
func (p *Package) Data() (io.ReadCloser, error) {
	unpacked, err := unpack(p.data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.data.name, err)
	}
	return unpacked, nil
}

// unpack unpacks a member by what its name ends in. bzip2 and lzma no distribution that we
// know uses any more.
func unpack(m member) (io.ReadCloser, error) {
	var format decompress.Format
	switch _, packed, _ := strings.Cut(m.name, ".tar"); packed {
	case "":
	case ".gz":
		format = decompress.Gzip
	case ".xz":
		format = decompress.Xz
	case ".zst":
		format = decompress.Zstd
	default:
		return nil, fmt.Errorf("is packed in a way that is not known (%.10q); gzip, xz and zstd are", packed)
	}
	return decompress.NewReader(io.NewSectionReader(m, 0, m.size), format)
}

// bounded is a reader that fails when there is more than there may be.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(buf []byte) (int, error) {
	n, err := b.r.Read(buf)
	if b.left -= int64(n); b.left < 0 {
		return 0, errors.New("unpacked, it is larger than it may be")
	}
	return n, err
}
