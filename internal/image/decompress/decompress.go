// Package decompress reads streams that are packed by gzip, bzip2, xz or zstd. They may be hostile:
// what unpacking takes of memory is bounded. How much comes out is not, and whoever reads bounds it.
package decompress

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"
)

// MaxWindow is how much memory the window of a stream by xz or zstd may take, in bytes: what xz -9
// and zstd --ultra ask for.
const MaxWindow = 128 << 20

// Format is a way in which a stream is packed.
type Format string

// The formats.
const (
	Plain Format = "" // not packed
	Gzip  Format = "gzip"
	Bzip2 Format = "bzip2"
	Xz    Format = "xz"
	Zstd  Format = "zstd"
)

// headSize is how many bytes of a stream tell how it is packed.
const headSize = 6

// FormatOf returns how a stream is packed, by its first six bytes, or fewer if it is shorter.
func FormatOf(head []byte) Format {
	switch {
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		return Gzip
	case bytes.HasPrefix(head, []byte("BZh")):
		return Bzip2
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return Xz
	case bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")), isSkippable(head):
		return Zstd
	}
	return Plain
}

// isSkippable reports whether a stream begins with a skippable frame, as ones by zstd may.
func isSkippable(head []byte) bool {
	return len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte("\x2a\x4d\x18"))
}

// NewReader returns a reader of what a stream holds that is packed in a given way. It has to be
// closed, which does not close the stream.
func NewReader(r io.Reader, format Format) (io.ReadCloser, error) {
	switch format {
	case Plain:
		return io.NopCloser(r), nil
	case Gzip:
		unpacked, err := gzip.NewReader(r)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(unpacked), nil // closing it would report what reading it did
	case Bzip2:
		return io.NopCloser(bzip2.NewReader(r)), nil
	case Xz:
		unpacked, err := xz.NewReader(r, MaxWindow)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(unpacked), nil
	case Zstd:
		unpacked, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(MaxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return unpacked.IOReadCloser(), nil
	}
	return nil, fmt.Errorf("there is no format %q", format)
}

// Detect returns a reader as [NewReader] does, of a stream that is packed in one of some formats,
// which its first bytes tell, or is not packed. What is packed in another is read as it is.
func Detect(r *bufio.Reader, formats ...Format) (io.ReadCloser, error) {
	head, err := r.Peek(headSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	format := FormatOf(head)
	if !slices.Contains(formats, format) {
		format = Plain
	}
	return NewReader(r, format)
}
