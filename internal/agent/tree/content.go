package tree

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxUnsized is how much is read of a file that says that it is empty: those of the
// kernel do, and are small.
const maxUnsized = 64 << 20

// content sends a file that has begun. Of a file that grows meanwhile only as much is
// sent as it had; one that shrinks is sent as far as it goes.
func (s *sender) content(file *os.File, path string, stat *unix.Stat_t) error {
	size, end := stat.Size, stat.Size
	if size == 0 {
		end = maxUnsized
	}
	// Fewer blocks than its length needs: it has holes.
	sparse := stat.Blocks*512 < size
	for offset := int64(0); offset < end; {
		data, next := offset, end
		if sparse {
			data, next = nextData(file, offset, end)
		}
		if data > offset {
			if err := s.out.Hole(data - offset); err != nil {
				return err
			}
		}
		n, err := s.pieces(file, data, next, sparse)
		var failed *readError
		switch {
		case errors.As(err, &failed):
			return s.fail(path, failed.err)
		case err != nil:
			return err
		case data+n < next:
			s.shrunk(file, path, size, data+n)
			return s.out.EndFile("")
		}
		offset = next
	}
	return s.out.EndFile("")
}

// shrunk notes that the length of a file has changed since it was opened. Files of the
// kernel's may be shorter than they say all the time.
func (s *sender) shrunk(file *os.File, path string, was, read int64) {
	if stat, err := fstat(file); err == nil && stat.Size != was && read < was {
		s.note(Note{Path: path, Text: fmt.Sprintf("it became shorter while it was copied: %d bytes of %d were there", read, was)})
	}
}

// readError is the error of a file that could not be read, and not of the stream.
type readError struct{ err error }

func (e *readError) Error() string { return e.err.Error() }

// pieces sends a part of a file, and returns how much of it there was.
func (s *sender) pieces(file *os.File, from, to int64, sparse bool) (sent int64, err error) {
	for from+sent < to {
		piece := s.buf[:min(int64(len(s.buf)), to-from-sent)]
		n, readErr := file.ReadAt(piece, from+sent)
		piece = piece[:n]
		if n > 0 {
			if sparse && isZero(piece) { // a file system that does not tell where holes are
				err = s.out.Hole(int64(n))
			} else {
				err = s.out.Data(piece)
			}
			if err != nil {
				return sent, err
			}
			sent += int64(n)
		}
		switch {
		case errors.Is(readErr, io.EOF):
			return sent, nil
		case readErr != nil:
			return sent, &readError{readErr}
		}
	}
	return sent, nil
}

// nextData returns where the next data of a file starts and ends. A file system that
// does not know has data everywhere.
func nextData(file *os.File, offset, end int64) (from, to int64) {
	fd := int(file.Fd())
	from, err := unix.Seek(fd, offset, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no more
		return end, end
	case err != nil:
		return offset, end
	}
	to, err = unix.Seek(fd, from, unix.SEEK_HOLE)
	if err != nil || to <= from {
		to = end
	}
	return min(from, end), min(to, end)
}

func isZero(p []byte) bool {
	return p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}
