package manager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/changes"
	"github.com/smolvm/smolvm/internal/store"
)

// Changes lists what a guest has changed in directories of the host that it has as overlays, as far
// as the host does not have it. The VM must run. The error matches [smolvm.ErrUnsupported] if the VM
// has no such directory.
func (m *Manager) Changes(ctx context.Context, id string) ([]smolvm.Change, error) {
	vm, err := m.lookup(ctx, id)
	if err != nil {
		return nil, err
	}
	found := []smolvm.Change{}
	err = m.eachOverlay(ctx, vm, "list the changes of", func(o *overlay) error {
		found = append(found, o.changes()...)
		return nil
	})
	return found, err
}

// Apply brings what [Manager.Changes] lists to the host, and returns it. A directory is written to
// only if nothing of it has changed on the host since the VM was created, or the last Apply, that
// the guest has changed too, unless opts say so. Each file is the old or the new one at any time.
func (m *Manager) Apply(ctx context.Context, id string, opts smolvm.ApplyOptions) ([]smolvm.Change, error) {
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	defer lock.unlock()
	applied := []smolvm.Change{}
	var all []*overlay
	err = m.eachOverlay(ctx, vm, "apply the changes of", func(o *overlay) error {
		if conflicts := o.plan.Conflicts; len(conflicts) > 0 && !opts.Force {
			return conflictError(o.mount, conflicts)
		}
		o.kept = true
		all = append(all, o)
		return nil
	})
	defer func() {
		for _, o := range all {
			o.close()
		}
	}()
	if err != nil {
		return nil, err
	}
	for _, o := range all {
		if err := changes.Apply(ctx, o.archive, o.root, o.plan); err != nil {
			return applied, fmt.Errorf("apply the changes of VM %q at %s: %w", id, o.mount.Target, err)
		}
		applied = append(applied, o.changes()...)
		vm.Config.Mounts[o.number].Since = time.Now().UTC()
	}
	return applied, m.store.SetConfig(ctx, vm)
}

// conflictError says what has changed on the host.
func conflictError(mount smolvm.Mount, conflicts []string) error {
	const shown = 5
	list := strings.Join(conflicts[:min(len(conflicts), shown)], ", ")
	if more := len(conflicts) - shown; more > 0 {
		list += fmt.Sprintf(" and %d more", more)
	}
	return &smolvm.Error{
		Hint: "compare them first; `smolvm apply --force` takes the guest's",
		Err:  fmt.Errorf("%s: both the guest and the host have changed %s", mount.Source, list),
	}
}

// overlay is what a guest has changed in one directory of the host.
type overlay struct {
	number  int
	mount   smolvm.Mount
	root    *os.Root
	spool   *os.File
	archive changes.Archive
	plan    *changes.Plan
	kept    bool // closed by somebody else
}

func (o *overlay) close() {
	_ = o.root.Close()
	_ = o.spool.Close()
}

// changes returns the changes, with their paths in the guest.
func (o *overlay) changes() []smolvm.Change {
	all := make([]smolvm.Change, 0, len(o.plan.Changes))
	for _, change := range o.plan.Changes {
		change.Path = path.Join(o.mount.Target, change.Path)
		all = append(all, change)
	}
	return all
}

// eachOverlay finds out what a guest has changed in each of its overlays.
func (m *Manager) eachOverlay(ctx context.Context, vm store.VM, purpose string, do func(*overlay) error) error {
	client, err := m.client(ctx, vm.ID, purpose)
	if err != nil {
		return err
	}
	none := true
	for number, mount := range vm.Config.Mounts {
		if mount.Mode != smolvm.MountOverlay {
			continue
		}
		none = false
		o := &overlay{number: number, mount: mount}
		err := m.fetchOverlay(ctx, vm, o, func(w io.Writer) error { return client.Changes(ctx, w, mount.OverlayName()) })
		if err == nil {
			err = do(o)
		}
		if o.root != nil && !o.kept {
			o.close()
		}
		if err != nil {
			return fmt.Errorf("%s VM %q at %s: %w", purpose, vm.ID, mount.Target, err)
		}
	}
	if none {
		return &smolvm.Error{
			Hint: "give it one when it is created: -v DIR:TARGET:overlay",
			Err:  fmt.Errorf("%s VM %q: %w: it has no directory of the host as an overlay", purpose, vm.ID, smolvm.ErrUnsupported),
		}
	}
	return nil
}

// fetchOverlay gets the archive of an overlay, and compares it with the host's directory.
func (m *Manager) fetchOverlay(ctx context.Context, vm store.VM, o *overlay, send func(io.Writer) error) error {
	root, err := os.OpenRoot(o.mount.Source)
	if err != nil {
		return err
	}
	spool, err := os.CreateTemp(m.dir.Root(), ".changes-")
	if err != nil {
		return errors.Join(err, root.Close())
	}
	o.root, o.spool = root, spool
	if err := os.Remove(spool.Name()); err != nil { // it ends with this process
		return err
	}
	const usualDisk = 8 << 30
	bound := &boundedFile{file: spool, left: max(vm.Config.DiskSizeMiB<<20, usualDisk) * 2}
	if err := send(bound); err != nil {
		return err
	}
	if o.archive.Size, err = spool.Seek(0, io.SeekCurrent); err != nil {
		return err
	}
	o.archive.File = spool
	o.plan, err = changes.Scan(ctx, o.archive, root, changes.Options{Since: o.mount.Since, Ignore: mountedIn(vm.Config.Mounts, o.mount)})
	return err
}

// mountedIn returns where others are mounted in a mount, as paths in it.
func mountedIn(all []smolvm.Mount, in smolvm.Mount) []string {
	var paths []string
	for _, mount := range all {
		if below, ok := strings.CutPrefix(mount.Target, in.Target+"/"); ok {
			paths = append(paths, below)
		}
	}
	return paths
}

// boundedFile writes what a guest sends to a file, as long as there is room on the disk, and not
// more than the guest's disk holds.
type boundedFile struct {
	file    *os.File
	left    int64
	checked int64 // bytes that may be written until the disk is looked at again
}

// Write implements [io.Writer].
func (b *boundedFile) Write(p []byte) (int, error) {
	const interval, reserve = 16 << 20, 256 << 20
	if b.left -= int64(len(p)); b.left < 0 {
		return 0, errors.New("the guest sends more than its disk holds")
	}
	if b.checked -= int64(len(p)); b.checked < 0 {
		var fs unix.Statfs_t
		if err := unix.Fstatfs(int(b.file.Fd()), &fs); err != nil {
			return 0, err
		}
		if int64(fs.Bavail)*fs.Bsize < reserve {
			return 0, fmt.Errorf("keep what the guest sends: %w", unix.ENOSPC)
		}
		b.checked = interval
	}
	return b.file.Write(p)
}
