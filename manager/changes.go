package manager

import (
	"context"
	"fmt"
	"io"
	"time"

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
	err = m.eachOverlay(ctx, vm, "list the changes of", func(_ int, o *changes.Overlay) error {
		found = append(found, o.Changes()...)
		o.Close()
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
	type numbered struct {
		mount int
		*changes.Overlay
	}
	var all []numbered
	defer func() {
		for _, o := range all {
			o.Close()
		}
	}()
	// All are looked at before the first is applied.
	err = m.eachOverlay(ctx, vm, "apply the changes of", func(mount int, o *changes.Overlay) error {
		all = append(all, numbered{mount, o})
		if opts.Force {
			return nil
		}
		return o.CheckConflicts()
	})
	if err != nil {
		return nil, err
	}
	for _, o := range all {
		if err := o.Apply(ctx); err != nil {
			return applied, fmt.Errorf("apply the changes of VM %q at %s: %w", id, vm.Config.Mounts[o.mount].Target, err)
		}
		applied = append(applied, o.Changes()...)
		vm.Config.Mounts[o.mount].Since = time.Now().UTC()
	}
	return applied, m.store.SetConfig(ctx, vm)
}

// eachOverlay finds out what a guest has changed in each of its overlays, which do closes. It gets the
// number of the mount.
func (m *Manager) eachOverlay(ctx context.Context, vm store.VM, purpose string, do func(mount int, o *changes.Overlay) error) error {
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
		const usualDisk = 8 << 30
		o, err := changes.Fetch(ctx, changes.Source{
			Mount: mount, Mounts: vm.Config.Mounts,
			Send:    func(ctx context.Context, w io.Writer) error { return client.Changes(ctx, w, mount.OverlayName()) },
			TempDir: m.dir.Root(), Limit: max(vm.Config.DiskSizeMiB<<20, usualDisk) * 2,
		})
		if err == nil {
			err = do(number, o)
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
