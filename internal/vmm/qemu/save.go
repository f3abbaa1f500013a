package qemu

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"time"

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
	// cancelTime is how long QEMU may take to give a migration up, on a busy host too.
	cancelTime = 30 * time.Second
)

// Save implements [vmm.Saver].
func (i *instance) Save(ctx context.Context, opts vmm.SaveOptions) (saved vmm.Saved, err error) {
	i.saving.Lock()
	defer i.saving.Unlock()
	fail := func(err error) (vmm.Saved, error) {
		return saved, fmt.Errorf("save VM %q: %w", i.cfg.ID, err)
	}
	var before status
	if err := i.qmp.execute(ctx, "query-status", &before); err != nil {
		return fail(err)
	}
	saved.Held = !before.Running
	s, err := i.openSaving(opts)
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, s.close(err != nil)) }()
	err = i.migrate(ctx, s)
	if err == nil {
		saved.Switched, err = i.switchOver(ctx, opts)
	}
	if before.Running && (!opts.Hold || err != nil) {
		// Even if nobody waits for it any more.
		held := i.heldSince()
		err = errors.Join(err, i.qmp.execute(context.WithoutCancel(ctx), "cont", nil))
		saved.Pause = time.Since(held)
	}
	if err != nil {
		return fail(err)
	}
	return saved, nil
}

// heldSince is when the guest was held for the last time.
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
	err := i.prepareMigration(ctx, capabilities{{"events", true}}, s.theirs)
	_ = s.theirs.Close() // QEMU has its own by now, and its end of the stream must be the last
	if err == nil {
		err = i.setMigration(ctx, map[string]any{"max-bandwidth": int64(saveBandwidth), "downtime-limit": firstDowntime.Milliseconds()})
	}
	if err == nil {
		err = i.qmp.settle(ctx, request{Execute: "migrate", Arguments: uriOf(stateFile)})
	}
	if err != nil {
		return err
	}
	round := time.NewTicker(downtimeRound)
	defer round.Stop()
	downtime := firstDowntime
	for {
		select {
		case state := <-i.migration:
			switch state {
			case stateCompleted:
				return s.wait()
			case stateFailed, stateCancelled:
				return errors.Join(i.migrationError(ctx), s.wait())
			}
		case <-round.C:
			downtime *= 2
			if err := i.setMigration(ctx, map[string]any{"downtime-limit": downtime.Milliseconds()}); err != nil {
				return errors.Join(err, i.cancelMigration(ctx))
			}
		case <-i.qmp.done:
			return errQMPClosed
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), i.cancelMigration(ctx))
		}
	}
}

func (i *instance) setMigration(ctx context.Context, parameters map[string]any) error {
	return i.qmp.settle(ctx, request{Execute: "migrate-set-parameters", Arguments: parameters})
}

// switchOver puts the overlays above the drives' files, all or none. The guest is held,
// and QEMU has written out its drives and let go of them. Before that would be too early:
// QEMU 7.2 can't let go of a drive of a restored guest that has got an overlay since.
func (i *instance) switchOver(ctx context.Context, opts vmm.SaveOptions) (switched bool, err error) {
	var actions []any
	next := map[int]string{}
	for n, overlay := range opts.Overlays {
		if overlay == "" {
			continue
		}
		i.switches++
		next[n] = fmt.Sprintf("%s-%d", driveID(n), i.switches)
		// Mode existing: what the overlay is based on is the drive's node, whatever its
		// header says.
		actions = append(actions, map[string]any{"type": "blockdev-snapshot-sync", "data": map[string]any{
			"node-name": i.disk(n), "snapshot-node-name": next[n], "snapshot-file": overlay, "format": "qcow2", "mode": "existing",
		}})
	}
	if len(actions) == 0 {
		return false, nil
	}
	if err := i.qmp.settle(ctx, request{Execute: "transaction", Arguments: map[string]any{"actions": actions}}); err != nil {
		return false, err
	}
	maps.Copy(i.disks, next)
	if opts.Switched != nil {
		err = opts.Switched()
	}
	return true, err
}

// disk is the name of the node that is a drive's disk now.
func (i *instance) disk(n int) string {
	if name, ok := i.disks[n]; ok {
		return name
	}
	return driveID(n)
}

func (i *instance) migrationError(ctx context.Context) error {
	var info struct {
		Error string `json:"error-desc"`
	}
	if err := i.qmp.execute(ctx, "query-migrate", &info); err != nil {
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
	done          chan error    // receives the result of splitting the stream
}

func (i *instance) openSaving(opts vmm.SaveOptions) (*saving, error) {
	const flags = os.O_CREATE | os.O_EXCL | os.O_RDWR
	memory, err := os.OpenFile(opts.Memory, flags, 0o600)
	if err != nil {
		return nil, err
	}
	s := &saving{memory: memory, done: make(chan error, 1)}
	err = memory.Truncate(int64(i.cfg.MemoryMiB) << 20)
	if err == nil {
		s.state, err = os.OpenFile(opts.State, flags, 0o600)
	}
	if err != nil {
		s.done <- nil
		return nil, errors.Join(err, s.close(true))
	}
	if s.stream, s.theirs, err = pair(); err != nil {
		s.done <- nil
		return nil, errors.Join(err, s.close(true))
	}
	go func() {
		err := splitStream(s.stream, s.state, s.memory)
		_ = s.stream.Close() // on failure this makes QEMU give up
		s.done <- err
	}()
	return s, nil
}

// wait returns when all of the stream has been written.
func (s *saving) wait() error {
	err := <-s.done
	s.done <- err
	return err
}

// close closes the files, and on failure removes them.
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
		errs = append(errs, file.Close())
		if failed {
			errs = append(errs, os.Remove(file.Name()))
		}
	}
	return errors.Join(errs...)
}
