package files

import (
	"archive/tar"
	"bufio"
	"errors"
	"io"

	"github.com/smolvm/smolvm/internal/image/decompress"
)

// detect returns a reader of an archive, packed or not.
func detect(r *bufio.Reader) (io.ReadCloser, error) {
	return decompress.Detect(r, decompress.Gzip, decompress.Bzip2, decompress.Xz, decompress.Zstd)
}

// IsArchive reports whether a file is an archive by tar: its first header can be read.
func IsArchive(open func() (io.ReadCloser, error)) (bool, error) {
	file, err := open()
	if err != nil {
		return false, err
	}
	defer func() { _ = file.Close() }()
	head := &failed{r: file}
	content, err := detect(bufio.NewReader(head))
	if err == nil {
		_, err = tar.NewReader(content).Next()
		_ = content.Close()
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
	content, err := detect(bufio.NewReaderSize(file, 1<<20))
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &archive{content, file}, nil
}

// archive is an archive that is unpacked.
type archive struct {
	io.ReadCloser
	file io.Closer
}

// Close closes its file, too.
func (a *archive) Close() error { return errors.Join(a.ReadCloser.Close(), a.file.Close()) }
