package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// saveBandwidth is no limit: the stream goes to a file by way of this process.
	saveBandwidth = 1 << 40 // bytes/s
	// A guest is held once so little of its memory is left to be saved that it can
	// be done within a downtime. One that changes its memory faster than that must be
	// held longer: the downtime grows with every round.
	firstDowntime = 20 * time.Millisecond
	downtimeRound = time.Second
	// longestDowntime is the longest that QEMU takes. With it a guest is held when QEMU
	// looks the second time what it has changed, some 100 ms after the beginning.
	longestDowntime = 2000 * time.Second
	// maxLooks is how often QEMU looks then: at the beginning, before the guest is held,
	// and after that.
	maxLooks = 3
	// lookTime is how long QEMU may take to answer how often it has looked. It may be
	// long: what comes meanwhile is unsafe, no more.
	lookTime = time.Second
	// cancelTime is how long QEMU may take to give a migration up, on a busy host too.
	cancelTime = 30 * time.Second
	// sendBuffer bounds, in bytes, what QEMU can have written that has not been read: the
	// kernel takes twice as much. What comes when the guest is held, with 190 KB of devices,
	// must be more than fits in there and in readAhead, see [saving.split].
	sendBuffer = 64 << 10
)

var (
	errNotHeld = errors.New("QEMU may have let go of the guest while its memory was read")
	// errHalted is the kind of error of a guest that QEMU holds by itself.
	errHalted     = errors.New("the guest can't go on")
	errLostWrites = errors.New("this version of QEMU can't save a guest that runs; pause the VM, and save it then")
)

// Save implements [vmm.Saver].
func (i *instance) Save(ctx context.Context, opts vmm.SaveOptions) (*vmm.Hold, error) {
	unlock, err := i.lockRunning(ctx)
	if err != nil {
		return nil, fmt.Errorf("save VM %q: %w", i.cfg.ID, err)
	}
	saved, err := i.save(ctx, opts)
	if err != nil {
		unlock()
		return nil, fmt.Errorf("save VM %q: %w", i.cfg.ID, err)
	}
	resume := func(ctx context.Context) error { return i.qmp.execute(ctx, "cont", nil) }
	return vmm.NewHold(saved, i.heldSince(), resume, unlock), nil
}

// save is Save for who has the lock.
func (i *instance) save(ctx context.Context, opts vmm.SaveOptions) (saved vmm.Saved, err error) {
	halts, halted := i.haltCount()
	var before status
	if err := i.qmp.execute(ctx, "query-status", &before); err != nil {
		return saved, err
	}
	if halted || before.Status == statusIOError {
		return saved, i.haltError()
	}
	saved.Held = !before.Running
	// Under KVM the kernel tells what the guest has written, and misses nothing. A guest
	// that is held writes nothing.
	var ram *guestRAM
	if i.cfg.Accelerator == vmm.TCG && before.Running {
		// Without it the guest is held longer.
		ram, _ = i.findRAM(i.PID(), int64(i.cfg.MemoryMiB)<<20, i.cfg.Restore != nil)
	}
	err = i.saveOnce(ctx, opts, ram, halts, &saved)
	if ram != nil && (errors.Is(err, errUnreadable) || errors.Is(err, errNotHeld)) {
		err = i.saveOnce(ctx, opts, nil, halts, &saved)
	}
	return saved, err
}

// saveOnce saves a guest, with its memory reread from ram if that is not nil, and leaves it
// held. Halts is how often QEMU had held it by itself before.
func (i *instance) saveOnce(ctx context.Context, opts vmm.SaveOptions, ram *guestRAM, halts int, saved *vmm.Saved) error {
	s, err := i.openSaving(ctx, opts, ram)
	if err != nil {
		return err
	}
	err = i.migrate(ctx, s)
	if err == nil {
		saved.Reread, saved.Stale, saved.Early = s.reread, s.stale, i.holdsEarly(s) && !saved.Held
		// A guest that could not go on before it was held has been saved as one that does
		// not run, with requests to its drives that have failed.
		if now, _ := i.haltCount(); now != halts {
			err = i.haltError()
		}
	}
	if err == nil {
		if err = s.close(false); err == nil {
			return nil
		}
	}
	if !saved.Held {
		err = i.goOn(context.WithoutCancel(ctx), err, halts) // even if nobody waits for it any more
	}
	return errors.Join(err, s.close(true))
}

// goOn lets a guest that could not be saved go on, and returns why it was not saved. A guest
// that QEMU has held by itself meanwhile is left held, as that is what has been told.
func (i *instance) goOn(ctx context.Context, why error, halts int) error {
	if now, _ := i.haltCount(); now != halts {
		if !errors.Is(why, errHalted) {
			why = errors.Join(why, i.haltError())
		}
		return errors.Join(why, i.qmp.execute(ctx, "stop", nil)) // QEMU may have restarted it
	}
	var now status
	err := i.qmp.execute(ctx, "query-status", &now)
	if err == nil && !now.Running {
		// Of a guest that runs QEMU would take this for the end of a stop that is due, as
		// after an I/O error, and never repeat the request that failed.
		err = i.qmp.execute(ctx, "cont", nil)
	}
	return errors.Join(why, err)
}

// haltCount returns how often QEMU has held the guest by itself since it was started, and reports
// whether it does now, or is about to.
func (i *instance) haltCount() (n int, now bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.haltsSeen, i.isHalted
}

// haltError is why QEMU held the guest the last time. It matches errHalted.
func (i *instance) haltError() error {
	i.mu.Lock()
	halt := i.lastHalt
	i.mu.Unlock()
	name := "one of its drives"
	if halt.Drive >= 0 {
		name = fmt.Sprintf("its drive vd%c", 'a'+halt.Drive)
	}
	if halt.NoSpace {
		return fmt.Errorf("%w: the host's disk is full (%s); make room, resume the VM, and save it then", errHalted, name)
	}
	return fmt.Errorf("%w: the host can't use the file of %s (%s); fix that, resume the VM, and save it then", errHalted, name, halt.Detail)
}

// lockRunning waits until nobody else saves, holds or continues the guest: what is saved
// records whether the guest ran, and after that it is to do what it did before.
func (i *instance) lockRunning(ctx context.Context) (unlock func(), err error) {
	return vmm.TakeTurn(ctx, i.running, i.done, errQMPClosed)
}

// heldSince is when the guest was held for the last time, zero if it has not been since the
// last migration began.
func (i *instance) heldSince() time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.stopped
}

// migrate runs the migration to its end, with the guest held then. On failure the
// migration has ended too.
func (i *instance) migrate(ctx context.Context, s *saving) error {
	for len(i.migration) > 0 {
		<-i.migration // of an earlier one
	}
	i.mu.Lock()
	i.stopped = time.Time{}
	i.mu.Unlock()
	err := i.prepareMigration(ctx, capabilities{{"events", true}}, s.theirs)
	_ = s.theirs.Close() // QEMU has its own by now, and its end of the stream must be the last
	downtime := firstDowntime
	if i.holdsEarly(s) {
		downtime = longestDowntime
	}
	if err == nil {
		err = i.setMigration(ctx, map[string]any{"max-bandwidth": int64(saveBandwidth), "downtime-limit": downtime.Milliseconds()})
	}
	if err == nil {
		err = i.qmp.settle(ctx, request{Execute: "migrate", Arguments: uriOf(stateFile)})
	}
	if err != nil {
		return err
	}
	if err := i.awaitMigration(ctx, s, downtime); err != nil || !i.holdsEarly(s) {
		return err
	}
	info, err := i.queryMigration(ctx)
	if err == nil && info.RAM.Looks > maxLooks {
		err = errLostWrites
	}
	return err
}

// holdsEarly reports whether the guest is held before QEMU sends anything after its second
// look, as nothing can be read once more.
func (i *instance) holdsEarly(s *saving) bool { return s.ram == nil && i.cfg.Accelerator == vmm.TCG }

// awaitMigration returns when the migration has ended, and all of it has been written.
func (i *instance) awaitMigration(ctx context.Context, s *saving, downtime time.Duration) error {
	round := time.NewTicker(downtimeRound)
	defer round.Stop()
	for {
		longer := min(2*downtime, longestDowntime)
		select {
		case state := <-i.migration:
			switch state {
			case stateCompleted:
				return s.wait()
			case stateFailed, stateCancelled:
				return errors.Join(i.migrationError(ctx), s.wait())
			}
			continue
		case <-s.enough:
			longer = longestDowntime
		case <-round.C:
		case <-i.qmp.done:
			return errQMPClosed
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), i.cancelMigration(ctx))
		}
		if longer == downtime {
			continue
		}
		downtime = longer
		if err := i.setMigration(ctx, map[string]any{"downtime-limit": downtime.Milliseconds()}); err != nil {
			return errors.Join(err, i.cancelMigration(ctx))
		}
	}
}

// looks asks QEMU how often it has looked at what the guest has changed. Once the guest is
// held QEMU may not answer before all of the stream has been read, so nobody waits for that.
func (i *instance) looks(ctx context.Context) looks {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	i.onStop(cancel)
	info, err := i.queryMigration(ctx)
	switch {
	case err == nil && info.RAM.Looks <= 1:
		return lookedOnce
	case err == nil || !i.heldSince().IsZero():
		return lookedAgain
	}
	return looksUnknown
}

// onStop has f called when the guest is held, or now if it has been since the migration
// began.
func (i *instance) onStop(f func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.stopping = f
	if !i.stopped.IsZero() {
		f()
	}
}

func (i *instance) setMigration(ctx context.Context, parameters map[string]any) error {
	return i.qmp.settle(ctx, request{Execute: "migrate-set-parameters", Arguments: parameters})
}

// migrationInfo is what query-migrate returns.
type migrationInfo struct {
	Error string `json:"error-desc"`
	RAM   struct {
		// Looks is how often QEMU has looked which pages the guest has changed.
		Looks int `json:"dirty-sync-count"`
	} `json:"ram"`
}

func (i *instance) queryMigration(ctx context.Context) (info migrationInfo, err error) {
	err = i.qmp.execute(ctx, "query-migrate", &info)
	return info, err
}

func (i *instance) migrationError(ctx context.Context) error {
	info, err := i.queryMigration(ctx)
	if err != nil {
		return err
	}
	if info.Error == "" {
		return errors.New("QEMU gave up")
	}
	return errors.New(info.Error)
}

// cancelMigration returns when the migration has ended.
func (i *instance) cancelMigration(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer cancel()
	err := i.qmp.execute(ctx, "migrate_cancel", nil)
	for err == nil {
		var state string
		state, err = i.nextState(ctx)
		if state == stateCancelled || state == stateFailed || state == stateCompleted {
			return nil
		}
	}
	return err
}

// saving is what a saving writes.
type saving struct {
	memory, state *os.File
	stream        *net.UnixConn // what QEMU writes
	theirs        *os.File      // QEMU's end of it
	received      int64         // how many bytes have been read from it
	splitter      *splitter
	ram           *guestRAM     // from where pages are read once more; nil: they are not
	enough        chan struct{} // receives when the guest must be held at all costs
	done          chan error    // receives the result of splitting the stream

	reread, stale int // pages; written before done receives
}

func (i *instance) openSaving(ctx context.Context, opts vmm.SaveOptions, ram *guestRAM) (*saving, error) {
	const flags = os.O_CREATE | os.O_EXCL | os.O_RDWR
	memory, err := os.OpenFile(opts.Memory, flags, 0o600)
	if err != nil {
		return nil, err
	}
	s := &saving{memory: memory, ram: ram, enough: make(chan struct{}, 1), done: make(chan error, 1)}
	err = memory.Truncate(int64(i.cfg.MemoryMiB) << 20)
	if err == nil {
		s.state, err = os.OpenFile(opts.State, flags, 0o600)
	}
	if err == nil {
		s.stream, s.theirs, err = pair()
	}
	if err == nil && ram != nil {
		err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(s.theirs.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer))
	}
	if err != nil {
		s.done <- nil
		return nil, errors.Join(err, s.close(true))
	}
	s.splitter = newSplitter(s, s.state, s.memory)
	if ram != nil {
		s.splitter.log.look = func() looks { return i.looks(ctx) }
		s.splitter.log.enough = func() { s.enough <- struct{}{} }
	}
	go func() {
		err := s.split()
		_ = s.stream.Close() // on failure this makes QEMU give up
		s.done <- err
	}()
	return s, nil
}

// Read reads what QEMU writes.
func (s *saving) Read(p []byte) (int, error) {
	n, err := s.stream.Read(p)
	s.received += int64(n)
	return n, err
}

// split splits the stream to its end. In between it corrects the memory, with the guest as it
// is when its devices are saved: if QEMU still has something to write after that, it was
// waiting for us to read, with its lock held, without which nothing in it goes on. Not even
// the guest being held would do: what comes by the guest channel is put into its memory then
// too.
func (s *saving) split() error {
	if s.ram == nil {
		return s.splitter.split()
	}
	memory, log := &s.splitter.memory, &s.splitter.log
	var written int64 // by QEMU, when the memory had been corrected
	s.splitter.guestHeld = func() (err error) {
		unsafe := log.unsafe()
		if s.reread = len(unsafe); s.reread == 0 {
			return nil
		}
		if s.stale, err = memory.correct(s.ram, unsafe); err != nil {
			return err
		}
		waiting, err := unread(s.stream)
		written = s.received + int64(waiting)
		return err
	}
	s.splitter.memoryEnds = func() error {
		if s.reread == 0 {
			return nil
		}
		return memory.check(s.ram, log)
	}
	err := s.splitter.split()
	if err == nil && s.received == written {
		err = errNotHeld
	}
	return err
}

// unread returns how many bytes lie in a socket that have not been read.
func unread(conn *net.UnixConn) (n int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return n, errors.Join(err, controlErr)
}

// wait returns when all of the stream has been written.
func (s *saving) wait() error {
	err := <-s.done
	s.done <- err
	return err
}

// close closes the files, and on failure removes them. It may be called again when it has
// failed.
func (s *saving) close(failed bool) error {
	if s.theirs != nil {
		_ = s.theirs.Close()
	}
	if failed && s.stream != nil {
		_ = s.stream.Close() // QEMU may have kept its end open
	}
	_ = s.wait()
	var errs []error
	for _, file := range []*os.File{s.memory, s.state} {
		if file == nil {
			continue
		}
		if err := file.Close(); !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
		}
		if failed {
			errs = append(errs, os.Remove(file.Name()))
		}
	}
	return errors.Join(errs...)
}
