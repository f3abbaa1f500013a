package backing

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/disk"
)

const (
	overlaySuffix, rawSuffix = "." + disk.QCOW2, "." + disk.Raw
	// OverlaySuffix ends the names of overlays in a VM's directory that the VM is to get
	// when it is saved.
	OverlaySuffix = ".overlay"
)

// isLayer reports whether a name is that of a disk of ours that is complete.
func isLayer(path string) bool {
	return strings.HasSuffix(path, overlaySuffix) || strings.HasSuffix(path, rawSuffix)
}

// Leaves reports whether there may be a layer that nothing needs once a disk is gone: its
// base, or, after a saving that was killed, the disk itself under another name.
func (d *Disks) Leaves(path string) bool {
	var stat unix.Stat_t
	if unix.Stat(path, &stat) != nil {
		return false
	}
	base, err := d.baseOfOwn(path)
	return stat.Nlink > 1 || err != nil || filepath.Dir(base.Path) == d.dir.Layers()
}

// Collect removes the layers that nothing needs any more. If anything keeps it from being
// sure of that, it removes nothing.
func (d *Disks) Collect(ctx context.Context) error {
	unlock, err := d.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := d.collect(ctx); err != nil {
		return fmt.Errorf("collect disks that nothing is based on (none was removed): %w", err)
	}
	return nil
}

func (d *Disks) collect(ctx context.Context) error {
	c := collection{Disks: d, needed: map[string]bool{}}
	if err := c.findCandidates(); err != nil {
		return err
	}
	for layer := range c.candidates {
		if err := c.checkReferences(ctx, layer); err != nil {
			return err
		}
	}
	if c.left() {
		if err := c.checkFiles(); err != nil {
			return err
		}
	}
	var errs []error
	for layer := range c.candidates {
		if !c.needed[layer] {
			errs = append(errs, os.Remove(layer), d.forget(ctx, layer, c.candidates[layer]))
		}
	}
	return errors.Join(errs...)
}

func (d *Disks) forget(ctx context.Context, path, base string) error {
	if base == "" {
		return nil
	}
	return d.refs.Remove(ctx, path, base)
}

// collection is one look for layers that nothing needs.
type collection struct {
	*Disks
	candidates map[string]string // layers that have no name elsewhere, and their bases
	layers     []string          // the others
	needed     map[string]bool
}

// findCandidates finds the layers that have no name elsewhere: that are the disk of no
// template, snapshot or draft, and not yet that of a VM that is being saved.
func (c *collection) findCandidates() error {
	entries, err := list(c.dir.Layers())
	if err != nil {
		return err
	}
	// Layers have names of the same file if a saving was tried again.
	names, links := map[uint64][]string{}, map[uint64]int{}
	for _, layer := range entries {
		if !isLayer(layer) {
			continue
		}
		var stat unix.Stat_t
		switch err := unix.Stat(layer, &stat); {
		case errors.Is(err, fs.ErrNotExist) && isGone(layer):
			continue
		case err != nil:
			return &fs.PathError{Op: "stat", Path: layer, Err: err}
		}
		names[stat.Ino], links[stat.Ino] = append(names[stat.Ino], layer), int(stat.Nlink)
	}
	c.candidates = map[string]string{}
	for file, layers := range names {
		if links[file] != len(layers) {
			c.layers = append(c.layers, layers...)
			continue
		}
		for _, layer := range layers {
			base, err := c.baseOfOwn(layer)
			if err != nil {
				return err
			}
			c.candidates[layer] = base.Path
		}
	}
	return nil
}

// checkReferences marks a layer as needed if a disk is written down as based on it. What
// is written down but is not so any more is removed.
func (c *collection) checkReferences(ctx context.Context, layer string) error {
	paths, err := c.refs.On(ctx, layer)
	if err != nil {
		return err
	}
	for _, path := range paths {
		if _, ok := c.candidates[path]; ok {
			continue // it is needed if that one is
		}
		var needed bool
		if isGone(path) {
			// A VM's disk may be elsewhere for a while.
			needed, err = c.refs.IsDisk(ctx, path)
		} else {
			var base File
			base, err = c.baseOfOwn(path) // one that is raw, and has been made, needs none
			needed = base.Path == layer
		}
		if err == nil && !needed {
			err = c.refs.Remove(ctx, path, layer)
		}
		if err != nil {
			return err
		}
		if needed {
			c.need(layer)
		}
	}
	return nil
}

// checkFiles marks the layers that files say they are based on.
func (c *collection) checkFiles() error {
	files := c.layers
	disks, err := list(c.dir.Disks())
	if err != nil {
		return err
	}
	files = append(files, disks...)
	for _, deeper := range []struct {
		dir   string
		depth int
		keep  func(path string) bool
	}{
		{c.dir.Pools(), 3, func(path string) bool { return strings.HasSuffix(path, overlaySuffix) }},
		{c.dir.VMs(), 2, func(path string) bool { return strings.HasSuffix(path, OverlaySuffix) }},
	} {
		paths, err := listDeep(deeper.dir, deeper.depth)
		if err != nil {
			return err
		}
		for _, path := range paths {
			if deeper.keep(path) {
				files = append(files, path)
			}
		}
	}
	for _, path := range files {
		if strings.HasPrefix(filepath.Base(path), disk.TempPrefix) {
			continue
		}
		base, err := c.baseOfAny(path)
		if err != nil && isGone(path) {
			continue
		}
		if err != nil {
			return err
		}
		c.need(base.Path)
	}
	return nil
}

// baseOfAny returns the base of a file of which no more is known than that it is in a
// directory for disks. It may be taken for an overlay that it is not: then a layer stays. One
// that is said to be raw is not looked at.
func (c *collection) baseOfAny(path string) (File, error) {
	if disk.FormatOf(path) == disk.Raw {
		return File{}, nil
	}
	info, err := disk.Probe(path)
	if ignoreNoFileSystem(err) != nil {
		return File{}, err
	}
	return c.baseOf(path, info.Format)
}

// need marks a layer and all that it is based on.
func (c *collection) need(layer string) {
	for layer != "" && !c.needed[layer] {
		c.needed[layer] = true
		layer = c.candidates[layer]
	}
}

// left reports whether there are candidates that have not been found to be needed so far, and
// that files may be based on.
func (c *collection) left() bool {
	for layer := range c.candidates {
		if !c.needed[layer] && disk.FormatOf(layer) != disk.Raw {
			return true
		}
	}
	return false
}

// isGone reports whether a name is not there any more. A link whose target is not there
// is.
func isGone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// list returns the paths of what is in a directory.
func list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	paths := make([]string, 0, len(entries))
	for _, entry := range entries {
		paths = append(paths, filepath.Join(dir, entry.Name()))
	}
	return paths, nil
}

// listDeep returns the paths of the files that are so many directories deep.
func listDeep(dir string, depth int) ([]string, error) {
	paths, err := list(dir)
	if err != nil || depth == 1 {
		return paths, err
	}
	var deep []string
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil && !isGone(path) {
			return nil, err
		}
		if err != nil || !info.IsDir() {
			continue
		}
		inner, err := listDeep(path, depth-1)
		if err != nil && !isGone(path) {
			return nil, err
		}
		deep = append(deep, inner...)
	}
	return deep, nil
}
