package treetar

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/smolvm/smolvm/internal/agent/tree"
)

// Read reads a tar stream and writes what is in it to out, as the contents of a
// directory, to the end of the stream. What has no place in a tree (devices, FIFOs,
// names with "..") is told to note.
func Read(r io.Reader, out *tree.Encoder, note func(tree.Note)) error {
	counted := &counter{r: r}
	t := reader{in: tar.NewReader(counted), out: out, note: note, buf: make([]byte, 64<<10)}
	if err := out.Begin(tree.Entry{Kind: tree.Dir, Mode: 0o755, Implicit: true}); err != nil {
		return err
	}
	for {
		header, err := t.in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = t.entry(header)
		}
		if err != nil {
			return fmt.Errorf("read tar stream: %w", err)
		}
	}
	if counted.n == 0 {
		return ErrEmpty
	}
	if err := t.moveTo(nil); err != nil {
		return err
	}
	if err := out.Leave(); err != nil {
		return err
	}
	return out.End()
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

type reader struct {
	in   *tar.Reader
	out  *tree.Encoder
	note func(tree.Note)
	path []string // of the directories that have begun
	buf  []byte
}

// The bounds of a name, as package tree has them.
const (
	maxName  = 255
	maxDepth = 2000
)

// split makes the parts of a name of a tar stream; ok is false if it leads out of the
// tree, or is too long for a file system.
func split(name string) (parts []string, ok bool) {
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "..", len(part) > maxName:
			return nil, false
		case part != "" && part != ".":
			parts = append(parts, part)
		}
	}
	return parts, len(parts) <= maxDepth
}

func (t *reader) entry(header *tar.Header) error {
	parts, ok := split(header.Name)
	if !ok {
		t.note(tree.Note{Path: header.Name, Text: "left out: its name has no place in a directory", Failed: true})
		return nil
	}
	if len(parts) == 0 { // the root, which is there
		return nil
	}
	entry := tree.Entry{
		Name:    parts[len(parts)-1],
		Mode:    uint32(header.Mode) & 0o7777,
		ModTime: header.ModTime,
		Size:    header.Size,
	}
	switch header.Typeflag {
	case tar.TypeDir:
		entry.Kind = tree.Dir
		if slices.Equal(t.path, parts) {
			return nil // begun already, for something in it
		}
	case tar.TypeReg, tar.TypeGNUSparse, '7': // '7' is a file of contiguous blocks
		entry.Kind = tree.File
	case tar.TypeSymlink:
		entry.Kind, entry.Link = tree.Symlink, header.Linkname
	case tar.TypeLink:
		link, ok := split(header.Linkname)
		if !ok {
			t.note(tree.Note{Path: header.Name, Text: "left out: a hard link to " + tree.Display(header.Linkname), Failed: true})
			return nil
		}
		entry.Kind, entry.Link = tree.HardLink, path.Join(link...)
	case tar.TypeXGlobalHeader:
		return nil
	default:
		t.note(tree.Note{Path: header.Name, Text: "left out: it is a device or a FIFO"})
		return nil
	}
	if err := t.moveTo(parts[:len(parts)-1]); err != nil {
		return err
	}
	if err := t.out.Begin(entry); err != nil {
		return err
	}
	switch entry.Kind {
	case tree.Dir:
		t.path = slices.Clone(parts)
	case tree.File:
		return t.content()
	default: // links have no more than their entry
	}
	return nil
}

// moveTo ends and begins directories until the one at path is the one that began last.
func (t *reader) moveTo(path []string) error {
	same := 0
	for same < min(len(path), len(t.path)) && path[same] == t.path[same] {
		same++
	}
	for range t.path[same:] {
		if err := t.out.Leave(); err != nil {
			return err
		}
	}
	t.path = append(t.path[:same:same], path[same:]...)
	for _, name := range path[same:] {
		if err := t.out.Begin(tree.Entry{Kind: tree.Dir, Name: name, Mode: 0o755, Implicit: true}); err != nil {
			return err
		}
	}
	return nil
}

// content passes a file's content on, blocks of zeros as holes.
func (t *reader) content() error {
	for {
		n, err := t.fill()
		if piece := t.buf[:n]; n > 0 {
			var outErr error
			if len(bytes.TrimLeft(piece, "\x00")) == 0 {
				outErr = t.out.Hole(int64(n))
			} else {
				outErr = t.out.Data(piece)
			}
			if outErr != nil {
				return outErr
			}
		}
		switch {
		case errors.Is(err, io.ErrUnexpectedEOF): // the stream is cut off
			return err
		case errors.Is(err, io.EOF):
			return t.out.EndFile("")
		case err != nil:
			return err
		}
	}
}

// fill reads until the buffer is full or the file ends.
func (t *reader) fill() (n int, err error) {
	for n < len(t.buf) && err == nil {
		var m int
		m, err = t.in.Read(t.buf[n:])
		n += m
	}
	return n, err
}
