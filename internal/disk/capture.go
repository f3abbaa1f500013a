package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/durable"
)

const (
	// mendPiece is how much of two files is compared at once, and mendBlock how much is
	// written where they differ, both in bytes.
	mendPiece = 1 << 20
	mendBlock = 64 << 10
	// maxMenders bounds how many pieces are compared at the same time: more are no faster
	// than the memory.
	maxMenders = 4
)

// Capture is a copy of a raw disk that is written to while the copy is begun. What it takes
// of the time in which the disk must not change, Finish, is short: where the file system can
// share blocks, whatever the disk holds; elsewhere all that the disk holds is read and
// compared, and what differs is written. That no write was seen is not relied on: nothing
// tells for sure which parts of a file were written to.
type Capture struct {
	in, out *os.File
	path    string
	size    int64
	shared  bool
	whole   bool
}

// BeginCapture begins a copy of the disk at source, which may be written to meanwhile, by all
// that can be copied before. The file at target must not be there. The caller calls Close in
// any case.
func BeginCapture(ctx context.Context, target, source string) (*Capture, error) {
	c := &Capture{path: target}
	fail := func(err error) (*Capture, error) {
		return nil, fmt.Errorf("copy disk %s: %w", source, errors.Join(err, c.Close()))
	}
	var err error
	if c.in, c.size, err = openBase(source); err != nil {
		return fail(err)
	}
	if c.out, err = os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600); err != nil {
		return fail(err)
	}
	if err = c.out.Truncate(c.size); err == nil {
		c.shared, err = share(c.out, c.in)
	}
	if err == nil && !c.shared {
		err = copyData(ctx, c.out, c.in, c.size)
	}
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// Prepare makes Finish short that follows soon: blocks are shared only once they are on
// stable storage.
func (c *Capture) Prepare() error {
	if !c.shared {
		return nil
	}
	if err := unix.Fdatasync(int(c.in.Fd())); err != nil {
		return &os.PathError{Op: "fdatasync", Path: c.in.Name(), Err: err}
	}
	return nil
}

// Finish makes the copy what the disk is now. Nobody writes to the disk while it runs.
func (c *Capture) Finish(ctx context.Context) error {
	err := c.finish(ctx)
	if err != nil {
		return fmt.Errorf("copy disk %s: %w", c.in.Name(), err)
	}
	c.whole = true
	return nil
}

func (c *Capture) finish(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	info, err := c.in.Stat()
	if err == nil && info.Mode().IsRegular() && info.Size() != c.size {
		err = fmt.Errorf("it had %d bytes, and has %d now", c.size, info.Size())
	}
	if err != nil {
		return err
	}
	if !c.shared {
		return c.mend(ctx)
	}
	shared, err := share(c.out, c.in)
	if err == nil && !shared {
		err = errors.New("the file system does not share blocks any more")
	}
	return err
}

// Sync writes the copy, and its name, to stable storage.
func (c *Capture) Sync() error { return errors.Join(c.out.Sync(), durable.Sync(filepath.Dir(c.path))) }

// Close closes the files, and removes the copy if it is not whole.
func (c *Capture) Close() error {
	var errs []error
	if c.in != nil {
		errs = append(errs, c.in.Close())
	}
	if c.out != nil {
		errs = append(errs, c.out.Close())
		if !c.whole {
			errs = append(errs, os.Remove(c.path))
		}
	}
	return errors.Join(errs...)
}

// mend compares what the disk holds with the copy, and corrects the copy.
func (c *Capture) mend(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(maxMenders, runtime.GOMAXPROCS(0)))
	buffers := sync.Pool{New: func() any { return &[2 * mendPiece]byte{} }}
	var covered int64
	err := eachExtent(c.in, c.size, func(start, end int64) error {
		if err := c.clear(covered, start); err != nil {
			return err
		}
		covered = end
		for at := start; at < end; at += mendPiece {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			group.Go(func() error {
				buffer, _ := buffers.Get().(*[2 * mendPiece]byte)
				defer buffers.Put(buffer)
				n := min(mendPiece, end-at)
				return c.mendPiece(at, buffer[:n], buffer[mendPiece:mendPiece+n])
			})
		}
		return nil
	})
	if waitErr := group.Wait(); waitErr != nil {
		err = waitErr // which is why the other one was given up
	}
	if err != nil {
		return err
	}
	return c.clear(covered, c.size)
}

// mendPiece corrects the copy at an offset. Is and was are room for a piece each.
func (c *Capture) mendPiece(at int64, is, was []byte) error {
	if _, err := c.in.ReadAt(is, at); err != nil {
		return err
	}
	if _, err := c.out.ReadAt(was, at); err != nil {
		return err
	}
	for from := 0; from < len(is); from += mendBlock {
		to := min(from+mendBlock, len(is))
		if bytes.Equal(is[from:to], was[from:to]) {
			continue
		}
		if _, err := c.out.WriteAt(is[from:to], at+int64(from)); err != nil {
			return err
		}
	}
	return nil
}

// clear makes a part of the copy read as zeros: what the guest has discarded meanwhile.
func (c *Capture) clear(from, to int64) error {
	for from < to {
		data, err := unix.Seek(int(c.out.Fd()), from, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= to {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find data: %w", err)
		}
		hole, err := unix.Seek(int(c.out.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("find hole: %w", err)
		}
		hole = min(hole, to)
		err = unix.Fallocate(int(c.out.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, data, hole-data)
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = c.zero(data, hole)
		}
		if err != nil {
			return fmt.Errorf("discard: %w", err)
		}
		from = hole
	}
	return nil
}

// zero writes zeros, where there can be no holes.
func (c *Capture) zero(from, to int64) error {
	zeros := make([]byte, mendBlock)
	for from < to {
		n, err := c.out.WriteAt(zeros[:min(int64(len(zeros)), to-from)], from)
		if err != nil {
			return err
		}
		from += int64(n)
	}
	return nil
}
