// Package treetar turns a stream of package tree into a tar stream, and back. Only the
// host needs that, for users' own archives, so the agent is spared package archive/tar.
package treetar

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/smolvm/smolvm/internal/agent/tree"
)

// maxBuffered is how much is held of a file whose length is not known beforehand, as
// it stands before the content in a tar stream. Files in /proc are such.
const maxBuffered = 1 << 20

// Options says how a tar stream is written.
type Options struct {
	// Name of the root. Empty: "."
	Name string
	// KeepLinks keeps symbolic links that lead out of the tree.
	KeepLinks bool
}

// Write reads a stream of an untrusted sender to its end, and writes it to w as a tar
// stream: in PAX format, owned by root, without set-id bits. What is left out is told
// to note. A file that ends before its announced length is filled up with zeros, and
// noted too.
func Write(w io.Writer, in *tree.Decoder, opts Options, note func(tree.Note)) error {
	t := writer{out: tar.NewWriter(w), in: in, opts: opts, note: note}
	for {
		event, err := in.Next()
		if err != nil {
			return err
		}
		switch event.Kind {
		case tree.EventEntry:
			err = t.entry(event.Entry)
		case tree.EventLeave:
			t.path = t.path[:len(t.path)-1]
		case tree.EventEnd:
			return t.out.Close()
		default: // the decoder lets nothing else through
			err = tree.ErrProtocol
		}
		if err != nil {
			return err
		}
	}
}

type writer struct {
	out  *tar.Writer
	in   *tree.Decoder
	opts Options
	note func(tree.Note)
	path []string // of the directories that have begun
}

func (t *writer) entry(entry tree.Entry) error {
	name := entry.Name
	if len(t.path) == 0 {
		if name = t.opts.Name; name == "" {
			name = "."
		}
	}
	full := strings.Join(append(t.path, name), "/")
	header := &tar.Header{
		Name:    full,
		Mode:    int64(entry.Permissions(true)),
		ModTime: entry.ModTime,
		Format:  tar.FormatPAX,
	}
	switch entry.Kind {
	case tree.File:
		return t.file(header, entry.Size)
	case tree.Dir:
		t.path = append(t.path, name)
		header.Typeflag, header.Name = tar.TypeDir, full+"/"
	case tree.Symlink:
		if !t.opts.KeepLinks && tree.LeadsOut(entry.Link, len(t.path)-1) {
			t.note(tree.Note{Path: full, Text: tree.LeftOutLink(entry.Link)})
			return nil
		}
		header.Typeflag, header.Linkname = tar.TypeSymlink, entry.Link
	default: // hard links are not taken by the decoder
		return tree.ErrProtocol
	}
	return t.out.WriteHeader(header)
}

func (t *writer) file(header *tar.Header, size int64) error {
	header.Typeflag, header.Size = tar.TypeReg, size
	if size > 0 {
		if most := t.in.Limits.MaxBytes; most > 0 && size > most {
			return fmt.Errorf("%s has %d bytes: %w", tree.Display(header.Name), size, tree.ErrLimit)
		}
		if err := t.out.WriteHeader(header); err != nil {
			return err
		}
		left, failure, err := t.content(t.out, size)
		if err != nil {
			return err
		}
		if left > 0 {
			t.note(tree.Note{Path: header.Name, Failed: failure != "", Text: fmt.Sprintf("its last %d bytes are missing; they are zeros in the tar stream", left)})
		}
		return tree.WriteZeros(t.out, left)
	}
	var buffered strings.Builder
	left, failure, err := t.content(&buffered, maxBuffered)
	switch {
	case err != nil:
		return err
	case failure != "":
		return nil // the sender told of it
	case left == 0:
		t.note(tree.Note{Path: header.Name, Failed: true, Text: fmt.Sprintf("cut after %d bytes: a tar stream needs to know its length beforehand", maxBuffered)})
	}
	header.Size = int64(buffered.Len())
	if err := t.out.WriteHeader(header); err != nil {
		return err
	}
	_, err = io.WriteString(t.out, buffered.String())
	return err
}

// content writes at most so much of a file's content, and returns what is left of that.
func (t *writer) content(w io.Writer, most int64) (left int64, failure string, err error) {
	for left = most; ; {
		event, err := t.in.Next()
		if err != nil {
			return left, "", err
		}
		switch event.Kind {
		case tree.EventData:
			piece := event.Data[:min(int64(len(event.Data)), left)]
			_, err = w.Write(piece)
			left -= int64(len(piece))
		case tree.EventHole:
			length := min(event.Hole, left)
			err = tree.WriteZeros(w, length)
			left -= length
		case tree.EventEndFile:
			return left, event.Failure, nil
		default: // the decoder lets nothing else through
			err = tree.ErrProtocol
		}
		if err != nil {
			return left, "", err
		}
	}
}

// ErrEmpty is the error of a tar stream without a byte in it.
var ErrEmpty = errors.New("the tar stream is empty")
