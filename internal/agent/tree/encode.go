package tree

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// The kinds of frames beside those of entries.
const (
	frameData    = 'd' // content of the file that was begun
	frameHole    = 'h' // so many bytes without content, 8 bytes
	frameEndFile = 'e' // empty, or why the file could not be read to its end
	frameLeave   = 'u' // the directory that was begun last is complete
	frameNote    = 'w'
	frameEnd     = 'T' // the tree is complete
	frameFail    = 'X' // there is no more: an errno of Linux and a text
)

// A frame's header is its kind and the length of what follows, in 4 bytes.
const headerLength = 5

// Fixed parts of an entry: mode, seconds, nanoseconds, size, flag, length of the name.
const entryLength = 4 + 8 + 4 + 8 + 1 + 2

// Encoder writes a stream of frames. It keeps the first error of its writer; the calls
// after it do nothing and return it again.
type Encoder struct {
	w   *bufio.Writer
	buf []byte
	err error
}

// NewEncoder returns an Encoder that writes to w, in pieces of 64 KiB.
func NewEncoder(w io.Writer) *Encoder {
	return &Encoder{w: bufio.NewWriterSize(w, 64<<10)}
}

func (e *Encoder) frame(kind byte, payload []byte) error {
	var header [headerLength]byte
	header[0] = kind
	binary.BigEndian.PutUint32(header[1:], uint32(len(payload)))
	if e.err == nil {
		_, e.err = e.w.Write(header[:])
	}
	if e.err == nil {
		_, e.err = e.w.Write(payload)
	}
	return e.err
}

// Begin writes the beginning of a file or a directory, or a whole link.
func (e *Encoder) Begin(entry Entry) error {
	if len(entry.Name) > maxName || len(entry.Link) > maxPath {
		return errors.Join(e.err, syscall.ENAMETOOLONG)
	}
	p := e.buf[:0]
	p = binary.BigEndian.AppendUint32(p, entry.Mode)
	p = binary.BigEndian.AppendUint64(p, uint64(entry.ModTime.Unix()))
	p = binary.BigEndian.AppendUint32(p, uint32(entry.ModTime.Nanosecond()))
	p = binary.BigEndian.AppendUint64(p, uint64(entry.Size))
	var implicit byte
	if entry.Implicit {
		implicit = 1
	}
	p = append(p, implicit)
	p = binary.BigEndian.AppendUint16(p, uint16(len(entry.Name)))
	p = append(p, entry.Name...)
	p = append(p, entry.Link...)
	e.buf = p
	return e.frame(byte(entry.Kind), p)
}

// Data writes the next piece of a file's content, of at most 64 KiB.
func (e *Encoder) Data(p []byte) error { return e.frame(frameData, p) }

// Hole writes that the next length bytes of a file are zeros that take no space.
func (e *Encoder) Hole(length int64) error {
	return e.frame(frameHole, binary.BigEndian.AppendUint64(nil, uint64(length)))
}

// EndFile ends a file. A failure says why it could not be read to its end; a receiver
// then drops what came of it.
func (e *Encoder) EndFile(failure string) error {
	return e.frame(frameEndFile, []byte(clip(failure, maxText)))
}

// Leave ends a directory.
func (e *Encoder) Leave() error { return e.frame(frameLeave, nil) }

// Note writes a note.
func (e *Encoder) Note(note Note) error {
	// Of a path that is too long the end says more.
	path := note.Path[max(0, len(note.Path)-maxPath):]
	var failed byte
	if note.Failed {
		failed = 1
	}
	p := append(e.buf[:0], failed)
	p = binary.BigEndian.AppendUint16(p, uint16(len(path)))
	p = append(p, path...)
	p = append(p, clip(note.Text, maxText)...)
	e.buf = p
	return e.frame(frameNote, p)
}

// End ends the stream.
func (e *Encoder) End() error {
	_ = e.frame(frameEnd, nil)
	return e.Flush()
}

// Fail ends the stream with the reason why it is not complete.
func (e *Encoder) Fail(reason error) error {
	var number syscall.Errno
	text := reason.Error()
	switch {
	case errors.As(reason, &number):
	case errors.Is(reason, fs.ErrNotExist):
		number = syscall.ENOENT
	case errors.Is(reason, os.ErrPermission):
		number = syscall.EACCES
	}
	p := binary.BigEndian.AppendUint32(e.buf[:0], uint32(number))
	p = append(p, clip(text, maxPath+maxText)...)
	_ = e.frame(frameFail, p)
	return e.Flush()
}

// Flush writes what is buffered.
func (e *Encoder) Flush() error {
	if e.err == nil {
		e.err = e.w.Flush()
	}
	return e.err
}

func clip(text string, length int) string { return text[:min(len(text), length)] }
