package manager

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/store"
)

// Watch yields events as they happen, of all processes that use the data directory, until
// ctx is done or the loop ends. Nothing is lost between two of them, however slow the loop
// is. An error is the last that it yields.
func (m *Manager) Watch(ctx context.Context, opts smolvm.WatchOptions) iter.Seq2[smolvm.Event, error] {
	return func(yield func(smolvm.Event, error) bool) {
		err := m.watch(ctx, opts, func(event smolvm.Event) bool { return yield(event, nil) })
		if err != nil {
			yield(smolvm.Event{}, fmt.Errorf("watch events: %w", err))
		}
	}
}

// watch calls each for events as they happen, until it returns false.
func (m *Manager) watch(ctx context.Context, opts smolvm.WatchOptions, each func(smolvm.Event) bool) error {
	changes, err := m.watchDatabase(ctx)
	if err != nil {
		return err
	}
	defer changes.close()
	after := opts.After
	if after == 0 {
		if after, err = m.store.Events().Last(ctx); err != nil {
			return err
		}
	}
	const batch = 1000
	for {
		events, err := m.store.Events().After(ctx, opts.VM, after, batch)
		if err != nil {
			return err
		}
		for _, event := range events {
			after = event.ID
			if !each(event) {
				return nil
			}
		}
		if len(events) == batch {
			continue
		}
		if err := changes.wait(ctx); err != nil {
			return err
		}
	}
}

// Wait returns when a VM is in one of some states, or, if none is named, when it does not
// run. The error matches [smolvm.ErrVMNotFound] if the VM is deleted meanwhile, as an
// ephemeral one is when it ends.
func (m *Manager) Wait(ctx context.Context, id string, states ...smolvm.VMState) (smolvm.VMInfo, error) {
	if len(states) == 0 {
		states = slices.DeleteFunc(smolvm.States(), smolvm.VMState.Alive)
	}
	changes, err := m.watchDatabase(ctx)
	if err != nil {
		return smolvm.VMInfo{}, vmError("wait for", id, err)
	}
	defer changes.close()
	var gone string // the run whose shim has ended
	for {
		vm, err := m.lookup(ctx, id)
		if err != nil {
			return smolvm.VMInfo{}, err
		}
		if slices.Contains(states, vm.State) {
			return m.info(vm), nil
		}
		if err := changes.waitBeside(ctx, awaitShim(vm, &gone)); err != nil {
			return smolvm.VMInfo{}, vmError("wait for", id, err)
		}
	}
}

// awaitShim returns what waits, beside the database, for the end of a VM's shim: one that is killed
// writes nothing down. Gone is the run whose shim has been seen to end.
func awaitShim(vm store.VM, gone *string) func(context.Context) error {
	return func(ctx context.Context) error {
		switch {
		case !vm.State.Alive():
			<-ctx.Done()
			return context.Cause(ctx)
		case vm.Run == *gone:
			// Somebody else holds the VM's lock, and is to write down how it ended.
			ctx, cancel := context.WithTimeout(ctx, settleTime)
			defer cancel()
			<-ctx.Done()
			return nil
		}
		err := proc.Wait(ctx, vm.ShimPID, vm.ShimStart)
		if err == nil {
			*gone = vm.Run
		}
		return err
	}
}

// settleTime is how long whoever ends a VM may take to write that down before it is looked
// at again.
const settleTime = time.Second

var errBeside = errors.New("what was waited for beside the database has come")

// databaseChanges tells that some process has written to the database.
type databaseChanges struct {
	events *os.File
	// settle waits for those who write: SQLite lets others see what was committed a moment
	// after it has written it to a file, and nothing is to be seen of that in files.
	settle func(context.Context) error
}

// watchDatabase begins to watch the database. What is written from then on, wait tells; all
// else can be read when it returns.
func (m *Manager) watchDatabase(ctx context.Context) (*databaseChanges, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify") // non-blocking, so that Close ends a Read
	// All that is written goes to the write-ahead log first, which is a file in that
	// directory; see https://sqlite.org/wal.html.
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(m.dir.Database()), unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		return nil, errors.Join(fmt.Errorf("inotify: %w", err), events.Close())
	}
	changes := &databaseChanges{events, m.store.AwaitWriters}
	if err := changes.settle(ctx); err != nil {
		return nil, errors.Join(err, events.Close())
	}
	return changes, nil
}

// wait returns when something has been written since it was last called, and can be read, or
// ctx is done. It may return for nothing.
func (c *databaseChanges) wait(ctx context.Context) error {
	if err := c.written(ctx); err != nil {
		return err
	}
	return c.settle(ctx)
}

// written returns when something has been written since it was last called, or ctx is done.
func (c *databaseChanges) written(ctx context.Context) error {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = c.events.SetReadDeadline(time.Now()) // ends the read
	})
	var buffer [32 << 10]byte
	_, err := c.events.Read(buffer[:])
	if !stop() {
		<-done
		return errors.Join(context.Cause(ctx), c.events.SetReadDeadline(time.Time{}))
	}
	return err
}

// waitBeside is wait that also returns when the function does without an error. The function
// has returned by then.
func (c *databaseChanges) waitBeside(ctx context.Context, beside func(context.Context) error) error {
	both, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if beside(both) == nil {
			cancel(errBeside)
		}
	}()
	err := c.written(both)
	cancel(nil)
	<-done
	if err != nil && !errors.Is(err, errBeside) {
		return err
	}
	return c.settle(ctx)
}

func (c *databaseChanges) close() { _ = c.events.Close() }
