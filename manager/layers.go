package manager

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/store"
)

// Layers are disks that do not change any more, and that others are overlays of: the
// disk of a template or a snapshot, which has the same file under a name of its own.
// A layer is needed as long as it has that other name, or some disk is based on it;
// both is read off the files, so nothing that is killed can leave a disk without its
// base.

// addLayer makes a disk a layer as well.
func (m *Manager) addLayer(path, name string) error {
	if err := os.Link(path, m.layerPath(name)); err != nil {
		return fmt.Errorf("keep disk: %w", err)
	}
	return nil
}

// dropUnusedLayer removes a layer that is but another name of a disk still, as its VM did
// not get an overlay of it after all.
func (m *Manager) dropUnusedLayer(name, diskPath string) error {
	layer, err := os.Stat(m.layerPath(name))
	if err != nil {
		return err
	}
	current, err := os.Stat(diskPath)
	if err != nil || !os.SameFile(layer, current) {
		return err
	}
	return os.Remove(m.layerPath(name))
}

// leavesLayer says whether there may be a layer that nothing needs once a disk is gone:
// its base, or, after a saving that was killed, the disk itself under another name.
func (m *Manager) leavesLayer(diskPath string) bool {
	var stat unix.Stat_t
	return unix.Stat(diskPath, &stat) == nil && (stat.Nlink > 1 || m.baseLayer(diskPath) != "")
}

// baseLayer is the layer that a disk is based on; empty if it is none.
func (m *Manager) baseLayer(diskPath string) string {
	info, err := disk.Probe(diskPath)
	if err != nil || filepath.Dir(info.Backing) != filepath.Join(m.dataDir, layersName) {
		return ""
	}
	return info.Backing
}

func (m *Manager) layerPath(name string) string {
	return filepath.Join(m.dataDir, layersName, name+".qcow2")
}

// lockLayers is held while a disk gets a base or loses it.
func (m *Manager) lockLayers(ctx context.Context) (unlock func(), err error) {
	file, err := os.OpenFile(filepath.Join(m.dataDir, layersName, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = flock.Lock(ctx, file)
	}
	if err != nil {
		return nil, fmt.Errorf("lock disks: %w", err)
	}
	return func() { _ = file.Close() }, nil
}

// rebase makes a VM's disk anew, as an overlay of base.
func (m *Manager) rebase(ctx context.Context, vm store.VM, base, format string) error {
	unlock, err := m.lockLayers(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	temp := vm.DiskPath + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err = disk.CreateOverlay(ctx, disk.Overlay{Path: temp, Base: base, BaseFormat: format, Size: vm.Config.DiskSizeMiB << 20})
	if err != nil {
		return err
	}
	return os.Rename(temp, vm.DiskPath)
}

// reclaimLayers removes the layers that nothing needs any more.
func (m *Manager) reclaimLayers(ctx context.Context) error {
	unlock, err := m.lockLayers(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	layers, err := glob.In(filepath.Join(m.dataDir, layersName), "*.qcow2")
	if err != nil {
		return err
	}
	// Layers have names of the same file if a saving was tried again.
	names, links := map[uint64][]string{}, map[uint64]int{}
	for _, layer := range layers {
		var stat unix.Stat_t
		if unix.Stat(layer, &stat) == nil {
			names[stat.Ino], links[stat.Ino] = append(names[stat.Ino], layer), int(stat.Nlink)
		}
	}
	alone := map[string]bool{}
	for file, layers := range names {
		for _, layer := range layers {
			if links[file] == len(layers) {
				alone[layer] = true
			}
		}
	}
	if len(alone) == 0 {
		return nil
	}
	disks, err := glob.In(m.DiskDir(), "*")
	if err != nil {
		return err
	}
	slots, err := glob.In(filepath.Join(m.dataDir, poolName), "*/*/"+slotDisk)
	if err != nil {
		return err
	}
	// A layer may be based on another, which is needed as long as the first is.
	for _, path := range append(append(disks, slots...), layers...) {
		if !alone[path] {
			m.markNeeded(path, alone)
		}
	}
	var errs []error
	for layer := range alone {
		errs = append(errs, os.Remove(layer))
	}
	return errors.Join(errs...)
}

// markNeeded takes the bases of a disk out of those that are not needed.
func (m *Manager) markNeeded(path string, alone map[string]bool) {
	for {
		info, err := disk.Probe(path)
		if err != nil || info.Backing == "" {
			return
		}
		path = info.Backing
		delete(alone, path)
	}
}
