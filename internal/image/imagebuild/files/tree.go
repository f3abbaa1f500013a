package files

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/image/ext4fs"
)

// Spool takes the content of files: it is what [ocilayer.Unpack] gives it to. It is in one file
// of the host, which has no name.
type Spool struct {
	file *os.File
	most int64
	end  int64
}

// NewSpool makes a spool in a directory. Content of more bytes than most is not kept; zero keeps
// all.
func NewSpool(dir string, most int64) (*Spool, error) {
	file, err := os.CreateTemp(dir, "content-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &Spool{file: file, most: most}, nil
}

// Close gives the content up.
func (s *Spool) Close() error { return s.file.Close() }

// notKept is the place of content that is not kept.
const notKept = -1

// Add takes the content of a file. What is zeros takes no room.
func (s *Spool) Add(r io.Reader, size int64) (ext4fs.Data, error) {
	if s.most > 0 && size > s.most {
		n, err := io.Copy(io.Discard, r)
		if err == nil && n != size {
			err = io.ErrUnexpectedEOF
		}
		return ext4fs.DataAt(notKept, size), err
	}
	const chunk = 1 << 20
	buffer := make([]byte, min(size, chunk))
	for done := int64(0); done < size; {
		part := buffer[:min(size-done, int64(len(buffer)))]
		if _, err := io.ReadFull(r, part); err != nil {
			return ext4fs.Data{}, err
		}
		if !isZero(part) {
			if _, err := s.file.WriteAt(part, s.end+done); err != nil {
				return ext4fs.Data{}, err
			}
		}
		done += int64(len(part))
	}
	data := ext4fs.DataAt(s.end, size)
	s.end += size
	return data, nil
}

func isZero(b []byte) bool { return b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1]) }

// Free gives content up, which goes with all the rest.
func (s *Spool) Free(ext4fs.Data) error { return nil }

// Nodes is a tree in memory whose content is in a spool. It is a [Tree].
type Nodes struct {
	Root  *ext4fs.Node
	Spool *Spool
}

// Empty returns a tree that has no files.
func Empty() Nodes { return Nodes{Root: &ext4fs.Node{Mode: unix.S_IFDIR | 0o755}} }

// Find finds a file without following links; nil if it is not there.
func (t Nodes) Find(name string) *ext4fs.Node {
	n := t.Root
	for part := range strings.SplitSeq(name, "/") {
		if part == "" {
			continue
		}
		if n = n.Children[part]; n == nil {
			return nil
		}
	}
	return n
}

func (t Nodes) find(name string) (*ext4fs.Node, error) {
	n := t.Find(name)
	if n == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return n, nil
}

// Lstat tells of a file.
func (t Nodes) Lstat(name string) (File, error) {
	n, err := t.find(name)
	if err != nil {
		return File{}, err
	}
	return File{Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Data.Size(), ModTime: n.ModTime, Link: n.Link, Device: n.Device, Xattrs: n.Xattrs, ID: n}, nil
}

// Names returns the names in a directory.
func (t Nodes) Names(name string) ([]string, error) {
	n, err := t.find(name)
	if err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(n.Children)), nil
}

// Open opens a regular file.
func (t Nodes) Open(name string) (io.ReadCloser, error) {
	n, err := t.find(name)
	switch {
	case err != nil:
		return nil, err
	case n.Data.Size() == 0:
		return io.NopCloser(strings.NewReader("")), nil
	case n.Data.Place() == notKept:
		return nil, fmt.Errorf("the content of %q has %d bytes, more than %d", name, n.Data.Size(), t.Spool.most)
	}
	// The spool is shorter if zeros are at its end.
	content := io.NewSectionReader(padded{t.Spool.file}, n.Data.Place(), n.Data.Size())
	return io.NopCloser(content), nil
}

// padded reads zeros behind the end of a file.
type padded struct{ io.ReaderAt }

func (p padded) ReadAt(b []byte, at int64) (int, error) {
	n, err := p.ReaderAt.ReadAt(b, at)
	if errors.Is(err, io.EOF) {
		clear(b[n:])
		return len(b), nil
	}
	return n, err
}
