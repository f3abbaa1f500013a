package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/vmm"
)

// QEMU is handed the files of its drives open, and knows them by the sets of descriptors that
// they are in. It opens a file again when it wants another access to it, and takes a copy of
// a descriptor then: whatever name a file has by then, or if it is out of QEMU's reach, it is
// the same file.

// fdsetPath is the name by which QEMU opens a file of a set; see -add-fd in qemu(1).
func fdsetPath(set int) string { return fmt.Sprintf("/dev/fdset/%d", set) }

// openDisk opens one file of a disk.
func openDisk(file vmm.DiskFile, readOnly bool) (_ *os.File, err error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	opened, err := os.OpenFile(file.Path, mode|unix.O_NONBLOCK, 0) // a FIFO would be waited for
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = opened.Close()
		}
	}()
	info, err := opened.Stat()
	if err != nil {
		return nil, err
	}
	isDevice := info.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice
	switch {
	case file.Device && !isDevice:
		return nil, fmt.Errorf("%s is no block device", file.Path)
	case !file.Device && !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no regular file", file.Path)
	}
	return opened, os.NewSyscallError("fcntl", unix.SetNonblock(int(opened.Fd()), false))
}

// openDisks opens the files of drives: for each its own, then those that it is based on.
func openDisks(drives []vmm.Drive) (disks [][]*os.File, err error) {
	for _, drive := range drives {
		chain := append([]vmm.DiskFile{{Path: drive.Path, Format: drive.Format, Device: drive.Device}}, drive.Backing...)
		disks = append(disks, nil)
		for n, file := range chain {
			opened, err := openDisk(file, drive.ReadOnly || n > 0)
			if err != nil {
				closeDisks(disks)
				return nil, err
			}
			disks[len(disks)-1] = append(disks[len(disks)-1], opened)
		}
	}
	return disks, nil
}

func closeDisks(disks [][]*os.File) {
	for _, file := range slices.Concat(disks...) {
		_ = file.Close()
	}
}

// diskNames replaces the names by which QEMU knows files by those that people know.
func diskNames(disks [][]*os.File, sets [][]int) *strings.Replacer {
	type name struct{ qemus, ours string }
	var names []name
	for d, chain := range disks {
		for n, file := range chain {
			names = append(names, name{fdsetPath(sets[d][n]), file.Name()})
		}
	}
	// One is the beginning of another.
	slices.SortFunc(names, func(a, b name) int { return cmp.Compare(len(b.qemus), len(a.qemus)) })
	var pairs []string
	for _, n := range names {
		pairs = append(pairs, n.qemus, n.ours)
	}
	return strings.NewReplacer(pairs...)
}

// diskSwitch implements [vmm.DiskSwitch].
type diskSwitch struct {
	instance *instance
	overlays []openOverlay // that no drive uses yet
}

type openOverlay struct {
	drive int
	node  string // empty: it is not there
	set   int    // of its descriptor
}

// OpenOverlays implements [vmm.DiskSwitcher].
func (i *instance) OpenOverlays(ctx context.Context, overlays []vmm.Overlay) (vmm.DiskSwitch, error) {
	if err := i.cfg.CheckOverlays(overlays); err != nil {
		return nil, fmt.Errorf("VM %q: %w", i.cfg.ID, err)
	}
	d := &diskSwitch{instance: i}
	for _, overlay := range overlays {
		if err := d.open(ctx, overlay.Drive, overlay.Path); err != nil {
			return nil, errors.Join(fmt.Errorf("open overlay %s of VM %q: %w", overlay.Path, i.cfg.ID, err), d.Close())
		}
	}
	return d, nil
}

func (d *diskSwitch) open(ctx context.Context, drive int, path string) error {
	file, err := openDisk(vmm.DiskFile{Path: path}, false)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	var added struct {
		Set int `json:"fdset-id"`
	}
	add := request{Execute: "add-fd", Arguments: map[string]any{"opaque": path}, file: file}
	if err := d.instance.qmp.settleWith(ctx, add, &added); err != nil {
		return err
	}
	d.overlays = append(d.overlays, openOverlay{drive: drive, set: added.Set})
	last := &d.overlays[len(d.overlays)-1]
	name := d.instance.nextDisk(drive)
	node := overlayNode(name, added.Set)
	if err := d.instance.qmp.settle(ctx, request{Execute: "blockdev-add", Arguments: node}); err != nil {
		return err
	}
	last.node = name
	return nil
}

// Switch implements [vmm.DiskSwitch]. QEMU has written out its drives and let go of them when
// the guest was saved. Before that would be too early: QEMU 7.2 can't let go of a drive of a
// restored guest that has got an overlay since.
func (d *diskSwitch) Switch(ctx context.Context) error {
	var actions []any
	next := map[int]string{}
	for _, overlay := range d.overlays {
		next[overlay.drive] = overlay.node
		actions = append(actions, map[string]any{"type": "blockdev-snapshot", "data": map[string]any{
			"node": d.instance.disk(overlay.drive), "overlay": overlay.node,
		}})
	}
	if len(actions) == 0 {
		return nil
	}
	if err := d.instance.qmp.settle(ctx, request{Execute: "transaction", Arguments: map[string]any{"actions": actions}}); err != nil {
		return fmt.Errorf("have the drives of VM %q written to overlays: %w", d.instance.cfg.ID, err)
	}
	d.overlays = nil // they are the drives' for good
	d.instance.mu.Lock()
	defer d.instance.mu.Unlock()
	maps.Copy(d.instance.disks, next)
	return nil
}

// Close implements [vmm.DiskSwitch].
func (d *diskSwitch) Close() error {
	ctx := context.Background() // a command that was sent is not given up
	var errs []error
	for _, overlay := range d.overlays {
		if overlay.node != "" {
			errs = append(errs, d.instance.qmp.settle(ctx, request{Execute: "blockdev-del", Arguments: map[string]any{"node-name": overlay.node}}))
		}
		errs = append(errs, d.instance.qmp.settle(ctx, request{Execute: "remove-fd", Arguments: map[string]any{"fdset-id": overlay.set}}))
	}
	d.overlays = nil
	return d.instance.unlessGone(errors.Join(errs...))
}

// overlayNode describes an overlay. What it is based on is the drive's node, whatever its
// header says; QEMU sees to that when it is used.
func overlayNode(name string, set int) *node {
	top := diskNode(vmm.DiskFile{Format: "qcow2"}, false, set)
	top.Name, top.Discard = name, "unmap"
	top.basedOn(nil)
	return top
}

// disk is the name of the node that is a drive's disk now.
func (i *instance) disk(n int) string {
	i.mu.Lock()
	defer i.mu.Unlock()
	if name, ok := i.disks[n]; ok {
		return name
	}
	return driveID(n)
}

// nextDisk is the name of another node for a drive.
func (i *instance) nextDisk(n int) string {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.switches++
	return fmt.Sprintf("%s-%d", driveID(n), i.switches)
}
