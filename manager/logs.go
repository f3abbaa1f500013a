package manager

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/proc"
)

// Logs reads the guest's serial console, which holds what its kernel and agent
// printed in all of the VM's runs. The caller closes the reader; ctx governs the
// reading.
func (m *Manager) Logs(ctx context.Context, id string, opts LogOptions) (io.ReadCloser, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return nil, err
	}
	file, err := os.Open(vm.LogPath)
	if errors.Is(err, fs.ErrNotExist) {
		// A VM that was never started has said nothing yet.
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	if err != nil {
		return nil, fmt.Errorf("read log of VM %q: %w", id, err)
	}
	if opts.Tail > 0 {
		if err := seekTail(file, opts.Tail); err != nil {
			_ = file.Close()
			return nil, fmt.Errorf("read log of VM %q: %w", id, err)
		}
	}
	if !opts.Follow || !vm.State.Alive() {
		return file, nil
	}
	follower, err := follow(ctx, file, func(ctx context.Context) error {
		return proc.Wait(ctx, vm.ShimPID, vm.ShimStart)
	})
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("follow log of VM %q: %w", id, err)
	}
	return follower, nil
}

// seekTail moves file to the start of its last n lines, reading backwards.
func seekTail(file *os.File, n int) error {
	end, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	// The line break that ends the last line does not begin another.
	for last := end - 1; end > 0; {
		size := min(end, int64(len(buf)))
		end -= size
		if _, err := file.ReadAt(buf[:size], end); err != nil {
			return err
		}
		for i := size - 1; i >= 0; i-- {
			if buf[i] != '\n' || end+i == last {
				continue
			}
			if n--; n == 0 {
				_, err := file.Seek(end+i+1, io.SeekStart)
				return err
			}
		}
	}
	_, err = file.Seek(0, io.SeekStart)
	return err
}

// follower reads a growing file until what writes it has ended.
type follower struct {
	ctx     context.Context // a reader's calls take none
	cancel  context.CancelFunc
	file    *os.File
	inotify *os.File
	ended   chan struct{} // closed when the writer has ended
	wait    sync.WaitGroup
}

// follow reports the end of file only when writerEnd returns. It owns file.
func follow(ctx context.Context, file *os.File, writerEnd func(context.Context) error) (*follower, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	inotify := os.NewFile(uintptr(fd), "inotify") // non-blocking, so that Close ends a Read
	if _, err := unix.InotifyAddWatch(fd, file.Name(), unix.IN_MODIFY); err != nil {
		_ = inotify.Close()
		return nil, fmt.Errorf("inotify: %w", err)
	}
	f := &follower{file: file, inotify: inotify, ended: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancel(ctx)
	f.wait.Go(func() {
		_ = writerEnd(f.ctx)
		close(f.ended)
		_ = inotify.Close() // wakes the reader
	})
	return f, nil
}

// Read implements [io.Reader].
func (f *follower) Read(p []byte) (int, error) {
	events := make([]byte, 4096)
	for {
		// Before the read: what the writer wrote last is then read below.
		ended := false
		select {
		case <-f.ended:
			ended = true
		default:
		}
		n, err := f.file.Read(p)
		if n > 0 || (err != nil && !errors.Is(err, io.EOF)) {
			return n, err
		}
		if err := f.ctx.Err(); err != nil {
			return 0, err
		}
		if ended {
			return 0, io.EOF
		}
		// An error means that inotify was closed, as the writer has ended.
		_, _ = f.inotify.Read(events)
	}
}

// Close implements [io.Closer].
func (f *follower) Close() error {
	f.cancel()
	f.wait.Wait()
	return f.file.Close()
}
