package ring

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Reader reads a log: first the previous file, if there is one, then the current one.
// A Reader of a log that goes on in another file while it is read goes there too.
type Reader struct {
	path  string
	files []*os.File // that are still to be read, the oldest first
	// offset is where the first of them is read next.
	offset int64

	follow *follower // nil: the log is read to the end that it has
}

// NewReader opens the log at path. The error is [fs.ErrNotExist] if there is none.
func NewReader(path string) (*Reader, error) {
	// A writer that turns the log over meanwhile makes us begin again.
	const attempts = 100
	for range attempts {
		current, err := os.Open(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		previous, previousErr := os.Open(Previous(path))
		r := &Reader{path: path}
		for _, file := range []*os.File{previous, current} {
			if file != nil {
				r.files = append(r.files, file)
			}
		}
		switch {
		case previousErr != nil && !errors.Is(previousErr, fs.ErrNotExist):
			return nil, errors.Join(previousErr, r.Close())
		case len(r.files) == 0:
			return nil, err
		case current == nil || r.isAt(current):
			// A log whose writer was killed while it turned it over has no current file.
			return r, nil
		}
		_ = r.Close()
	}
	return nil, fmt.Errorf("open %s: it is replaced faster than it can be opened", path)
}

// isAt reports whether file is the one at the log's path.
func (r *Reader) isAt(file *os.File) bool { return same(file, r.path) }

func same(file *os.File, path string) bool {
	ours, err := file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(ours, there)
}

// SeekTail skips all but the last n lines. It is to be called before the first Read.
func (r *Reader) SeekTail(n int) error {
	buffer := make([]byte, 32<<10)
	atEnd := true
	for i, file := range slices.Backward(r.files) {
		info, err := file.Stat()
		if err != nil {
			return err
		}
		size := info.Size()
		last := int64(-1)
		if atEnd && size > 0 {
			last, atEnd = size-1, false // the line break that ends the last line begins no other
		}
		for end := size; end > 0; {
			length := min(end, int64(len(buffer)))
			end -= length
			if _, err := file.ReadAt(buffer[:length], end); err != nil {
				return err
			}
			for k := length - 1; k >= 0; k-- {
				if buffer[k] != '\n' || end+k == last {
					continue
				}
				if n--; n == 0 {
					r.skip(i)
					r.offset = end + k + 1
					return nil
				}
			}
		}
	}
	return nil
}

// skip closes the first n files.
func (r *Reader) skip(n int) {
	for _, file := range r.files[:n] {
		_ = file.Close()
	}
	r.files, r.offset = r.files[n:], 0
}

// Read implements [io.Reader].
func (r *Reader) Read(p []byte) (int, error) {
	for {
		// Before the read: what the writer wrote last is then read below.
		ended := r.follow == nil || r.follow.hasEnded()
		n, err := r.readFiles(p)
		if n > 0 || !errors.Is(err, io.EOF) {
			return n, err
		}
		if r.follow == nil {
			return 0, io.EOF
		}
		if err := r.follow.ctx.Err(); err != nil {
			return 0, err
		}
		if r.goOn() {
			continue
		}
		if ended {
			return 0, io.EOF
		}
		r.follow.wait()
	}
}

// readFiles reads up to the end of the last file that is open.
func (r *Reader) readFiles(p []byte) (int, error) {
	for len(r.files) > 0 {
		n, err := r.files[0].ReadAt(p, r.offset)
		r.offset += int64(n)
		if n > 0 || len(p) == 0 {
			return n, nil
		}
		if !errors.Is(err, io.EOF) || len(r.files) == 1 {
			return 0, err
		}
		r.skip(1)
	}
	return 0, io.EOF
}

// goOn opens the files that follow the last one, which has been read to its end. It
// reports whether there are any.
func (r *Reader) goOn() bool {
	last := r.files[0]
	if r.isAt(last) {
		// One that was cut off, as it could not be replaced, is read from its beginning.
		if info, err := last.Stat(); err == nil && info.Size() < r.offset {
			r.offset = 0
			return true
		}
		return false
	}
	next, err := NewReader(r.path)
	if err != nil {
		return false // it is being replaced: there will be another event
	}
	if same(last, Previous(r.path)) {
		// What was written to it after we had read it, and then the current one.
		if len(next.files) < 2 {
			_ = next.Close()
			return false
		}
		next.skip(1)
		r.files = append(r.files, next.files...)
		return true
	}
	// The log was turned over more than once since.
	r.files = append(r.files, next.files...)
	return true
}

// Close implements [io.Closer].
func (r *Reader) Close() error {
	if r.follow != nil {
		r.follow.close()
	}
	var errs []error
	for _, file := range r.files {
		errs = append(errs, file.Close())
	}
	r.files = nil
	return errors.Join(errs...)
}

// Follow makes Read wait for more at the end of the log, until writerEnd returns or ctx
// is done.
func (r *Reader) Follow(ctx context.Context, writerEnd func(context.Context) error) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify") // non-blocking, so that Close ends a Read
	// The directory, not the file: the log goes on in another one when this one is full.
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(r.path), unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		_ = events.Close()
		return fmt.Errorf("inotify: %w", err)
	}
	f := &follower{events: events, ended: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancel(ctx)
	f.background.Go(func() {
		_ = writerEnd(f.ctx)
		close(f.ended)
		_ = events.Close() // wakes the reader
	})
	r.follow = f
	return nil
}

// follower waits for changes of a log.
type follower struct {
	ctx        context.Context // a reader's calls take none
	cancel     context.CancelFunc
	events     *os.File
	ended      chan struct{} // closed when the writer has ended
	background sync.WaitGroup
}

func (f *follower) hasEnded() bool {
	select {
	case <-f.ended:
		return true
	default:
		return false
	}
}

// wait returns when something has changed. An error means that the events were closed, as
// the writer has ended.
func (f *follower) wait() { _, _ = f.events.Read(make([]byte, 4<<10)) }

func (f *follower) close() {
	f.cancel()
	f.background.Wait()
}
