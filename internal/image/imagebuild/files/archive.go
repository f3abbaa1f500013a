package files

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"
)

// maxWindow is how much memory an archive packed by xz or zstd may need, in bytes.
const maxWindow = 128 << 20

// Beginnings of files by which it is known how they are packed.
const (
	magicGzip  = "\x1f\x8b"
	magicBzip2 = "BZh"
	magicXz    = "\xfd7zXZ\x00"
	magicZstd  = "\x28\xb5\x2f\xfd"
)

// unpacked returns a reader of what is packed by gzip, bzip2, xz or zstd, or is not packed.
func unpacked(r *bufio.Reader) (io.Reader, func(), error) {
	nothing := func() {}
	head, _ := r.Peek(8)
	switch {
	case bytes.HasPrefix(head, []byte(magicGzip)):
		unpacked, err := gzip.NewReader(r)
		return unpacked, nothing, err
	case bytes.HasPrefix(head, []byte(magicBzip2)):
		return bzip2.NewReader(r), nothing, nil
	case bytes.HasPrefix(head, []byte(magicXz)):
		unpacked, err := xz.NewReader(r, maxWindow)
		return unpacked, nothing, err
	case bytes.HasPrefix(head, []byte(magicZstd)):
		unpacked, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nothing, err
		}
		return unpacked, unpacked.Close, nil
	}
	return r, nothing, nil
}

// IsArchive reports whether a file is an archive by tar: its first header can be read.
func IsArchive(open func() (io.ReadCloser, error)) (bool, error) {
	file, err := open()
	if err != nil {
		return false, err
	}
	defer func() { _ = file.Close() }()
	head := &failed{r: file}
	content, done, err := unpacked(bufio.NewReader(head))
	defer done()
	if err == nil {
		_, err = tar.NewReader(content).Next()
	}
	return err == nil, head.err
}

// failed keeps the error of a reader, which is not one of what it reads.
type failed struct {
	r   io.Reader
	err error
}

func (f *failed) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		f.err = err
	}
	return n, err
}

// OpenArchive opens an archive, unpacked.
func OpenArchive(open func() (io.ReadCloser, error)) (io.ReadCloser, error) {
	file, err := open()
	if err != nil {
		return nil, err
	}
	content, done, err := unpacked(bufio.NewReaderSize(file, 1<<20))
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &archive{content, func() error { done(); return file.Close() }}, nil
}

// archive is an archive that is unpacked.
type archive struct {
	io.Reader
	close func() error
}

// Close closes its file.
func (a *archive) Close() error { return a.close() }
