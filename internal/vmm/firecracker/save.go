package firecracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
)

// goOnTime bounds how long Firecracker may take to have a guest go on that could not be saved:
// it finishes first what it was doing, which is to write the guest's memory to a disk.
const goOnTime = time.Minute

// Save implements [vmm.Saver]. The guest's channel is reset by it: Firecracker tells the guest
// that all its connections are gone, and knows them no more in what was saved.
func (i *instance) Save(ctx context.Context, opts vmm.SaveOptions) (*vmm.Hold, error) {
	unlock, err := i.lockRunning(ctx)
	if err != nil {
		return nil, fmt.Errorf("save VM %q: %w", i.cfg.ID, err)
	}
	before := i.paused
	since, err := i.save(ctx, opts)
	if err != nil {
		unlock()
		return nil, fmt.Errorf("save VM %q: %w", i.cfg.ID, err)
	}
	resume := func(ctx context.Context) error { return i.setState(ctx, false) }
	return vmm.NewHold(vmm.Saved{Held: before}, since, resume, unlock), nil
}

// save is Save for who has the lock. It leaves the guest paused, unless it fails.
func (i *instance) save(ctx context.Context, opts vmm.SaveOptions) (since time.Time, err error) {
	files, err := i.makeFiles(opts)
	if err != nil {
		return since, err
	}
	defer func() { err = errors.Join(err, files.close(err != nil)) }()
	// The guest may as well learn of it now, in order.
	i.resetChannel()
	if !i.paused {
		// Even if nobody waits for it any more, or for Firecracker's answer.
		defer func() {
			if err != nil && i.paused {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), goOnTime)
				defer cancel()
				err = errors.Join(err, i.setState(ctx, false))
			}
		}()
		since = time.Now()
		if err := i.setState(ctx, true); err != nil {
			return since, err
		}
	}
	err = i.api.CreateSnapshot(ctx, api.CreateParams{Memory: nameSaved + nameMemory, State: nameSaved + nameState})
	if err != nil {
		return since, err
	}
	return since, files.finish(ctx)
}

// savedFiles are those that a guest is saved to.
type savedFiles struct {
	dir  *runDir
	made []savedFile
}

type savedFile struct{ path, name string } // and its name in Firecracker's directory

// makeFiles makes the files of a saving, which must not be there, and has Firecracker write to
// them, or in its jail to others that take their place.
func (i *instance) makeFiles(opts vmm.SaveOptions) (_ *savedFiles, err error) {
	f := &savedFiles{dir: i.dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close(true))
		}
	}()
	for _, one := range []savedFile{{opts.State, nameSaved + nameState}, {opts.Memory, nameSaved + nameMemory}} {
		file, err := os.OpenFile(one.path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		f.made = append(f.made, one)
		if err := file.Close(); err != nil {
			return nil, err
		}
		if i.dir.jail != nil {
			continue
		}
		if err := i.dir.link(one.path, one.name); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// finish makes the files that Firecracker has written what they are to be.
func (f *savedFiles) finish(ctx context.Context) error {
	if f.dir.jail != nil {
		for _, one := range f.made {
			if err := f.dir.take(one.name, one.path); err != nil {
				return err
			}
		}
	}
	memory, err := os.OpenFile(f.made[len(f.made)-1].path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(punchHoles(ctx, memory), memory.Close())
}

// close takes the files away from Firecracker, and removes them if they are of no use.
func (f *savedFiles) close(remove bool) error {
	var errs []error
	for _, one := range f.made {
		errs = append(errs, f.dir.unlink(one.name))
		if remove {
			errs = append(errs, os.Remove(one.path))
		}
	}
	return errors.Join(errs...)
}

const (
	pageSize   = 4096
	holesChunk = 1 << 20
)

// punchHoles makes a file sparse where it holds zeros. Firecracker writes a guest's memory
// whole. A diff snapshot would leave out what the guest never wrote, but only a guest whose
// pages are tracked can be saved so, which makes it slower from its boot on; from 1.13 on it
// works without, by mincore(2), which loses pages that were swapped out.
func punchHoles(ctx context.Context, file *os.File) error {
	chunk, zeros := make([]byte, holesChunk), make([]byte, pageSize)
	fd := int(file.Fd())
	begin, end := int64(0), int64(0) // of the hole that has been found
	punch := func() error {
		if begin == end {
			return nil
		}
		err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, begin, end-begin)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil // this file system has no holes, so the file stays as it is
		}
		return os.NewSyscallError("fallocate", err)
	}
	for at := int64(0); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := file.ReadAt(chunk, at)
		for page := 0; page+pageSize <= n; page += pageSize {
			if !bytes.Equal(chunk[page:page+pageSize], zeros) {
				continue
			}
			here := at + int64(page)
			if here != end {
				if err := punch(); err != nil {
					return err
				}
				begin = here
			}
			end = here + pageSize
		}
		at += int64(n)
		switch {
		case errors.Is(err, io.EOF):
			return punch()
		case err != nil:
			return err
		}
	}
}
