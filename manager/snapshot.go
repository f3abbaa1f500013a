package manager

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/compat"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/start"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

// snapshotMeta is what is kept with a snapshot.
type snapshotMeta struct {
	// Format is what [snapshotMeta.needs] returned. Zero: from before there was one.
	Format   int              `json:"format,omitempty"`
	VMID     string           `json:"vm_id"`
	Config   smolvm.VMConfig  `json:"config"`
	Image    string           `json:"image"`
	Hardware machine.Hardware `json:"hardware"`
	// MachineID is the VM's, by which it is told from a later one of the same id.
	MachineID string `json:"machine_id,omitempty"`
	// Layer is the name of the disk's layer; empty for a VM without a disk.
	Layer string `json:"layer"`
	// DiskFormat is that of the disk. Empty: qcow2.
	DiskFormat string        `json:"disk_format,omitempty"`
	Pause      time.Duration `json:"pause_ns"`
	Held       bool          `json:"held,omitempty"` // as in [vmm.Saved]
	Synced     bool          `json:"synced"`
	// Exact says that the memory is the guest's at one moment, whatever it was doing.
	// Before the program saw to that, emulated guests that were busy were saved with some
	// pages out of date.
	Exact bool `json:"exact,omitempty"`
}

// snapshotFormat is the highest number of what is kept with a snapshot that this program
// knows; see package compat. Each snapshot has the lowest that it needs, see [snapshotMeta.needs].
const snapshotFormat = withMounts

// What a program must know of to restore a snapshot. Each number includes those before it.
const (
	plainFormat = 1
	// withRawDisk is that of one with a raw disk: a program from before there were such would
	// take the disk for a qcow2 one.
	withRawDisk = 2
	// withEgress is that of one of a VM with an egress policy: a program from before there were
	// any would make a VM that may reach everything.
	withEgress = 3
	// withNetwork is that of one of a VM with another network than the usual one: a program from
	// before would connect the guest by that.
	withNetwork = 4
	// withMounts is that of one of a VM with directories of the host: a program from before there
	// were any would leave the guest with what is not connected to anything.
	withMounts = 5
)

// needs returns the lowest number with which the snapshot is not taken for something else.
func (meta snapshotMeta) needs() int {
	switch {
	case len(meta.Config.Mounts) > 0:
		return withMounts
	case meta.Config.Network != (smolvm.Network{}) && meta.Config.Network != smolvm.Network{Mode: smolvm.NetworkUser}:
		return withNetwork
	case meta.Config.Egress != nil:
		return withEgress
	case meta.DiskFormat == disk.Raw:
		return withRawDisk
	}
	return plainFormat
}

// layer returns the path of the disk's layer.
func (meta snapshotMeta) layer(dir *datadir.Dir) string {
	return dir.Layer(meta.Layer, cmp.Or(meta.DiskFormat, disk.QCOW2))
}

// doubts is why the memory may not be what the guest's was, or nil.
func (meta snapshotMeta) doubts(name string) error {
	if meta.Exact || meta.Held || meta.Hardware.Accelerator != vmm.TCG {
		return nil
	}
	return fmt.Errorf("snapshot %s was taken by an older smolvm: if VM %s was busy then, programs in the restored one may crash or hang; take it anew", name, meta.VMID)
}

// restore returns the VMM's settings that load this snapshot.
func (meta snapshotMeta) restore(path func(file string) string) vmm.Restore {
	return vmm.Restore{Memory: path(snapshot.MemoryFile), State: path(snapshot.StateFile), Held: meta.Held}
}

// CreateSnapshot saves a VM as it is at some moment: its memory, its devices, its disk.
// The VM goes on; how long it was held is told. A snapshot is whole or not there,
// whatever is killed in the middle of it.
//
// A guest without an agent can't be told to write out its file systems, nor, later, that it
// is another VM: its snapshot can only be restored in place. See [smolvm.RestoreOptions].
//
// The error matches [smolvm.ErrSnapshotAlreadyExists], [smolvm.ErrInvalidState] if the
// VM does not run, or [smolvm.ErrUnsupported] if it has drives that are written to
// beside its own disk.
func (m *Manager) CreateSnapshot(ctx context.Context, id string, opts smolvm.SnapshotOptions) (smolvm.Snapshot, error) {
	began := time.Now()
	name := opts.Name
	if name == "" {
		name = fmt.Sprintf("%.40s-%s", id, began.UTC().Format("20060102-150405"))
	}
	if err := smolvm.ValidateID(name); err != nil {
		return smolvm.Snapshot{}, fmt.Errorf("name of the snapshot: %w", err)
	}
	draft, meta, err := m.save(ctx, id, name)
	if err != nil {
		return smolvm.Snapshot{}, err
	}
	step.Reached(ctx, "snapshot/saved")
	found, err := draft.Commit(ctx, meta, m.bootID())
	if err != nil {
		return smolvm.Snapshot{}, errors.Join(snapshotError(err), m.disks.Collect(context.WithoutCancel(ctx)))
	}
	step.Reached(ctx, "snapshot/published")
	m.note(ctx, id, "snapshot", began, name)
	return snapshotInfo(found)
}

// snapshotError makes the errors of package snapshot those of the domain.
func snapshotError(err error) error {
	switch {
	case errors.Is(err, smolvm.ErrAlreadyExists):
		return fmt.Errorf("%w: %w; choose another name, or remove it first", smolvm.ErrSnapshotAlreadyExists, err)
	case errors.Is(err, smolvm.ErrNotFound):
		return &smolvm.Error{Code: smolvm.CodeSnapshotNotFound, Hint: "`smolvm snapshot ls` lists the snapshots",
			Err: fmt.Errorf("%w: %w", smolvm.ErrSnapshotNotFound, err)}
	}
	return err
}

// save saves a VM into a draft, which is the caller's.
func (m *Manager) save(ctx context.Context, id, name string) (_ *snapshot.Draft, meta snapshotMeta, err error) {
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return nil, meta, err
	}
	defer lock.unlock()
	if !vm.State.Alive() {
		return nil, meta, stateError("snapshot", vm)
	}
	if err := m.budget.Check(); err != nil {
		return nil, meta, fmt.Errorf("snapshot VM %q: %w", id, err)
	}
	if meta, err = m.snapshotMeta(ctx, vm); err != nil {
		return nil, meta, fmt.Errorf("snapshot VM %q: %w", id, err)
	}
	if err := m.snapshots.Clean(); err != nil {
		return nil, meta, err
	}
	draft, err := m.snapshots.Draft(name)
	if err != nil {
		return nil, meta, snapshotError(err)
	}
	step.Reached(ctx, "save/draft")
	saved, err := m.saveInto(ctx, vm, draft, meta)
	if err != nil {
		ctx := context.WithoutCancel(ctx)
		return nil, meta, errors.Join(fmt.Errorf("snapshot VM %q: %w", id, err), draft.Discard(), m.disks.Collect(ctx))
	}
	meta.Pause, meta.Held, meta.Synced, meta.Exact = saved.Pause, saved.Held, saved.Synced, true
	return draft, meta, nil
}

func (m *Manager) snapshotMeta(ctx context.Context, vm store.VM) (snapshotMeta, error) {
	config := vm.Config
	if config.DiskMode != smolvm.DiskIsolated {
		return snapshotMeta{}, fmt.Errorf("%w: the disk is shared", smolvm.ErrUnsupported)
	}
	for _, drive := range config.Drives {
		if !drive.ReadOnly {
			return snapshotMeta{}, fmt.Errorf("%w: drive %s may be written to, and is not part of a snapshot", smolvm.ErrUnsupported, drive.Path)
		}
	}
	machine, err := m.machines.Config(ctx, vm, vm.Accelerator)
	if err != nil {
		return snapshotMeta{}, err
	}
	h, err := m.machines.HardwareOf(vm.Backend, machine)
	if err != nil {
		return snapshotMeta{}, err
	}
	meta := snapshotMeta{VMID: vm.ID, Config: config, Image: vm.Image, Hardware: h, MachineID: vm.MachineID}
	if vm.DiskPath != "" {
		meta.Layer = "snapshot-" + shim.NewRun()
	}
	if disk.FormatOf(vm.DiskPath) == disk.Raw {
		meta.DiskFormat = disk.Raw
	}
	meta.Format = meta.needs()
	return meta, nil
}

// saveInto saves a VM with its disk, if it has one.
func (m *Manager) saveInto(ctx context.Context, vm store.VM, draft *snapshot.Draft, meta snapshotMeta) (shim.Saved, error) {
	save := shim.Save{Memory: draft.Path(snapshot.MemoryFile), State: draft.Path(snapshot.StateFile)}
	switch {
	case meta.Layer == "":
		return shim.NewClient(m.runtimeDir(vm.ID)).Save(ctx, save)
	case meta.DiskFormat == disk.Raw:
		return m.saveCopy(ctx, vm, draft, meta.Layer, save)
	}
	return m.saveOverlay(ctx, vm, draft, meta.Layer, save)
}

// saveCopy saves a VM with a raw disk, of which a copy is made that becomes a layer. The VM
// keeps its disk. The layer is for those disks that are to be made of it and are not yet: the
// draft may be gone by then.
func (m *Manager) saveCopy(ctx context.Context, vm store.VM, draft *snapshot.Draft, layer string, save shim.Save) (shim.Saved, error) {
	draft.Disk = snapshot.DiskFile(disk.Raw)
	path := draft.Path(draft.Disk)
	if err := m.disks.RoomFor(vm.DiskPath, filepath.Dir(path)); err != nil {
		return shim.Saved{}, err
	}
	save.Drives = []shim.SavedDrive{{Number: 0, Path: vm.DiskPath, Copy: path}}
	saved, err := shim.NewClient(m.runtimeDir(vm.ID)).Save(ctx, save)
	if err != nil {
		return saved, err
	}
	step.Reached(ctx, "save/saved")
	// Before a disk is made of it that would be so after a power cut.
	if err := m.disks.Persist(path); err != nil {
		return saved, err
	}
	unlock, err := m.disks.Lock(ctx)
	if err != nil {
		return saved, err
	}
	defer unlock()
	err = m.disks.AddLayer(ctx, path, layer)
	step.Reached(ctx, "save/layer")
	return saved, err
}

// saveOverlay saves a VM with a qcow2 disk. That becomes a layer, of which the VM gets an
// overlay that has the disk's name from then on. Until that moment the layer is but another
// name of the disk, so neither can be lost.
func (m *Manager) saveOverlay(ctx context.Context, vm store.VM, draft *snapshot.Draft, layer string, save shim.Save) (saved shim.Saved, err error) {
	draft.Disk = snapshot.DiskFile(disk.QCOW2)
	layerPath := m.dir.Layer(layer, disk.QCOW2)
	// The shim gives it the disk's name, or removes it. Its own name is of this saving
	// only: the shim may still be at that of another process that was killed.
	overlay := filepath.Join(m.vmDir(vm.ID), layer+backing.OverlaySuffix)
	defer func() {
		// The shim has finished with it by then, or has not begun.
		if _, statErr := os.Lstat(overlay); err != nil && errors.Is(statErr, fs.ErrNotExist) {
			err = errors.Join(err, m.disks.DropUnused(context.WithoutCancel(ctx), layer, vm.DiskPath))
		}
	}()
	if err := m.makeLayer(ctx, vm.DiskPath, draft.Path(draft.Disk), layer, overlay); err != nil {
		return shim.Saved{}, err
	}
	step.Reached(ctx, "save/layer")
	// The lock of the layers is not held meanwhile: the draft has the layer's file too, and
	// keeps it.
	save.Drives = []shim.SavedDrive{{Number: 0, Layer: layerPath, Overlay: overlay, Path: vm.DiskPath}}
	if saved, err = shim.NewClient(m.runtimeDir(vm.ID)).Save(ctx, save); err != nil {
		return saved, err
	}
	step.Reached(ctx, "save/saved")
	return saved, errors.Join(m.store.Bases().Persist(ctx, vm.DiskPath, layerPath), durable.Sync(m.DiskDir()))
}

// makeLayer makes a disk a layer and the disk of a draft as well, and an overlay of it.
func (m *Manager) makeLayer(ctx context.Context, path, draft, layer, overlay string) error {
	unlock, err := m.disks.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.disks.AddLayer(ctx, path, layer); err != nil {
		return err
	}
	step.Reached(ctx, "save/layer named")
	if err := os.Link(path, draft); err != nil {
		return err
	}
	base := m.dir.Layer(layer, disk.QCOW2)
	if err := m.store.Bases().Add(ctx, overlay, base); err != nil {
		return err
	}
	return m.disks.Create(ctx, backing.Disk{Path: overlay, Base: base, BaseFormat: disk.QCOW2, Sync: true})
}

// Snapshots lists the snapshots, the oldest first.
func (m *Manager) Snapshots(context.Context) ([]smolvm.Snapshot, error) {
	all, err := m.snapshots.List()
	if err != nil {
		return nil, err
	}
	infos := make([]smolvm.Snapshot, 0, len(all))
	for _, one := range all {
		info, err := snapshotInfo(one)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}

func snapshotInfo(found snapshot.Snapshot) (smolvm.Snapshot, error) {
	var meta snapshotMeta
	if err := json.Unmarshal(found.Meta, &meta); err != nil {
		return smolvm.Snapshot{}, fmt.Errorf("snapshot %q: %w", found.Name, err)
	}
	return smolvm.Snapshot{
		Name: found.Name, VMID: meta.VMID, Config: meta.Config, Image: meta.Image,
		Backend: meta.Hardware.Backend, Accelerator: meta.Hardware.Accelerator,
		Pause: meta.Pause, Synced: meta.Synced, Size: found.Size, CreatedAt: found.CreatedAt,
	}, nil
}

// RemoveSnapshot removes a snapshot. VMs that were restored from it go on. The error
// matches [smolvm.ErrSnapshotNotFound].
func (m *Manager) RemoveSnapshot(ctx context.Context, name string) error {
	if err := m.snapshots.Remove(name); err != nil {
		return snapshotError(err)
	}
	step.Reached(ctx, "snapshot rm/removed")
	return m.disks.Collect(ctx)
}

// RestoreSnapshot makes a VM that goes on where a snapshot was taken, with an identity
// of its own. If the memory can't be used, because it is damaged or the VMM has been
// upgraded since, the error matches [smolvm.ErrNotRestored], unless the options allow the
// VM to boot from the snapshot's disk. On failure there is no new VM, and one that was to
// be restored in place is as it was.
//
// A guest without an agent can't be given another identity: the error matches
// [smolvm.ErrUnsupported] unless its VM is restored in place. Its clock is not set then.
func (m *Manager) RestoreSnapshot(ctx context.Context, name string, opts smolvm.RestoreOptions) (smolvm.VMInfo, error) {
	found, err := m.snapshots.Get(name)
	if err != nil {
		return smolvm.VMInfo{}, snapshotError(err)
	}
	var meta snapshotMeta
	if err := json.Unmarshal(found.Meta, &meta); err != nil {
		return smolvm.VMInfo{}, fmt.Errorf("snapshot %q: %w", name, err)
	}
	if err := compat.Check(fmt.Sprintf("snapshot %q", name), meta.Format, snapshotFormat); err != nil {
		return smolvm.VMInfo{}, err
	}
	from := start.Saved{
		Method:    smolvm.StartSnapshot,
		Source:    name,
		Files:     meta.restore(found.Path),
		Base:      meta.layer(m.dir),
		InSession: true,
		Must:      !opts.AllowCold,
		Doubts:    meta.doubts(name),
	}
	if !opts.InPlace && !meta.Config.UsesImage() {
		return smolvm.VMInfo{}, fmt.Errorf("restore snapshot %q: %w: its guest has no agent that could give it another identity, so there would be two VMs of the same address and keys; stop VM %q and restore it in place",
			name, smolvm.ErrUnsupported, meta.VMID)
	}
	damage := m.snapshots.Verify(ctx, found, m.bootID())
	if opts.InPlace {
		return m.restoreInPlace(ctx, meta, from, damage, opts)
	}
	return m.revive(ctx, meta, from, damage, opts)
}

// revive makes a VM of a saved one. Damage is why its memory can't be used, if not nil.
func (m *Manager) revive(ctx context.Context, meta snapshotMeta, from start.Saved, damage error, opts smolvm.RestoreOptions) (smolvm.VMInfo, error) {
	config := meta.Config
	config.ID = opts.ID
	if config.ID == "" {
		config.ID = meta.VMID
		if _, err := m.store.GetVM(ctx, meta.VMID); err == nil {
			config.ID = smolvm.NewID()
		}
	}
	if config.ID != meta.VMID {
		config.Hostname = ""
		config.PortForwards = append([]smolvm.PortForward(nil), config.PortForwards...)
		for i := range config.PortForwards {
			config.PortForwards[i].HostPort = 0 // that of the other VM is taken
		}
	}
	config.Ephemeral = opts.Ephemeral
	if opts.WithoutSecrets {
		config.Secrets = nil
	}
	within, err := inherit(&config, opts.Egress)
	if err != nil {
		return smolvm.VMInfo{}, fmt.Errorf("create %q: %w", config.ID, err)
	}
	config = config.WithDefaults()
	vm, err := m.create(ctx, config, origin{image: meta.Image, layer: from.Base, within: within})
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	if damage == nil {
		damage = m.compatible(ctx, vm, meta.Hardware)
	}
	info, err := m.startFrom(ctx, vm.ID, opts.Start, &from, damage)
	if err != nil {
		return smolvm.VMInfo{}, errors.Join(err, m.Delete(context.WithoutCancel(ctx), vm.ID, smolvm.DeleteOptions{}))
	}
	return info, nil
}

// compatible says why a VM can't go on from memory that was saved on some hardware.
func (m *Manager) compatible(ctx context.Context, vm store.VM, saved machine.Hardware) error {
	accelerator, err := m.accelerator(ctx, vm.Backend)
	if err != nil {
		return err
	}
	machine, err := m.machines.Config(ctx, vm, accelerator)
	if err != nil {
		return err
	}
	now, err := m.machines.HardwareOf(vm.Backend, machine)
	if err != nil {
		return err
	}
	if what := saved.Difference(now); what != "" {
		return fmt.Errorf("it was saved by another VMM or on another host: %s", what)
	}
	return nil
}

// Fork makes children of a running VM: each goes on where the parent is, with an
// identity of its own. The parent goes on too. It is all or nothing: if one of them can't
// go on there, the error matches [smolvm.ErrNotRestored], and there are none.
func (m *Manager) Fork(ctx context.Context, id string, opts smolvm.ForkOptions) (smolvm.Forked, error) {
	began := time.Now()
	count := max(opts.Count, len(opts.IDs), 1)
	if vm, err := m.lookup(ctx, id); err == nil {
		if !vm.Config.UsesImage() {
			return smolvm.Forked{}, fmt.Errorf("fork VM %q: %w: its guest has no agent that could give a child another identity", id, smolvm.ErrUnsupported)
		}
		if err := findSecrets(vm.Config.Secrets); err != nil && !opts.WithoutSecrets {
			return smolvm.Forked{}, vmError("fork", id, err)
		}
	}
	draft, meta, err := m.save(ctx, id, "fork-"+shim.NewRun())
	if err != nil {
		return smolvm.Forked{}, err
	}
	// The children have its memory mapped, and its disk is a layer, which a raw disk needs only
	// until it is made.
	defer func() {
		_ = draft.Discard()
		if meta.DiskFormat == disk.Raw {
			m.site().Collect(context.WithoutCancel(ctx), id)
		}
	}()
	from := start.Saved{
		Method:    smolvm.StartSnapshot,
		Source:    id,
		Files:     meta.restore(draft.Path),
		Base:      meta.layer(m.dir),
		InSession: true,
		Must:      !opts.AllowCold,
	}
	forked := smolvm.Forked{Pause: meta.Pause, Children: make([]smolvm.VMInfo, count)}
	group, groupCtx := errgroup.WithContext(ctx)
	for i := range count {
		restore := smolvm.RestoreOptions{ID: smolvm.NewID(), Start: opts.Start, Egress: opts.Egress, WithoutSecrets: opts.WithoutSecrets}
		if i < len(opts.IDs) {
			restore.ID = opts.IDs[i]
		}
		group.Go(func() (err error) {
			forked.Children[i], err = m.revive(groupCtx, meta, from, nil, restore)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		for _, child := range forked.Children {
			if child.ID != "" {
				err = errors.Join(err, m.Delete(context.WithoutCancel(ctx), child.ID, smolvm.DeleteOptions{}))
			}
		}
		return smolvm.Forked{}, fmt.Errorf("fork VM %q: %w", id, errors.Join(err, m.disks.Collect(context.WithoutCancel(ctx))))
	}
	step.Reached(ctx, "fork/children")
	m.note(ctx, id, "fork", began, fmt.Sprintf("%d", count))
	return forked, nil
}
