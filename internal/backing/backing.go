// Package backing keeps the disks of a data directory that others are based on, and the
// chains of files that they make.
//
// A disk's name declares its format, for as long as there is the disk. One in qcow2 is an
// overlay of another. One that is raw is a copy of another, with which it has nothing in common
// any more but blocks that the file system shares by itself.
//
// A layer is a disk that does not change any more and that others are overlays of: the
// disk of a template or a snapshot, which has the same file under another name. A layer is
// needed as long as it has that other name, or some disk is based on it. Which disk is based
// on which is written down before the disk is made (see [References]), and the headers of the
// files say it as well: a layer is removed only if both agree that it is not needed. A file
// that can't be read leaves a doubt, and ends a collection. A raw layer is needed by a disk
// only until that has been made.
//
// An overlay's header names its base by a relative path, as seen from a directory just below
// the data directory, so that it is right in disks/ and in layers/. VMMs don't use that name:
// they are given the chain.
package backing

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/flock"
)

// References are the records of which disk is based on which. Paths are absolute.
type References interface {
	// Add writes down that a disk is based on another, or is about to be.
	Add(ctx context.Context, path, base string) error
	// Remove takes that back.
	Remove(ctx context.Context, path, base string) error
	// On returns the disks that are written down as based on a file.
	On(ctx context.Context, base string) ([]string, error)
	// IsBased reports whether a disk is written down as based on any.
	IsBased(ctx context.Context, path string) (bool, error)
	// IsDisk reports whether a file is the disk of a VM.
	IsDisk(ctx context.Context, path string) (bool, error)
}

// Disks are the disks of a data directory.
type Disks struct {
	dir  *datadir.Dir
	refs References
	// Room returns an error if there is no room for so many bytes more; nil: there is.
	Room func(bytes int64) error
}

// New returns the disks of a data directory.
func New(dir *datadir.Dir, refs References) *Disks { return &Disks{dir: dir, refs: refs} }

// File is one file of a chain.
type File = disk.File

// Lock waits for the lock that is held while a disk gets a base or loses it. It is for
// short: the disks of all VMs wait for it.
func (d *Disks) Lock(ctx context.Context) (unlock func(), err error) {
	if unlock, err = flock.At(ctx, d.dir.LayersLock()); err != nil {
		return nil, fmt.Errorf("lock disks: %w", err)
	}
	return unlock, nil
}

// Disk is a disk to be made from another: an overlay of it, or, if its name says that it is
// raw, a copy.
type Disk struct {
	// Path is the path of the new disk.
	Path string
	// Base is the file that the new disk is to be based on, or a copy of, and BaseFormat that
	// file's format. A raw disk has a raw base.
	Base, BaseFormat string
	// Size is that of the new disk, in bytes. Zero: the base's.
	Size int64
	// Replace and Sync are as in [disk.Overlay].
	Replace, Sync bool
}

// Create makes a disk. The base of an overlay must have been written down; if it is a layer,
// the lock must be held.
func (d *Disks) Create(ctx context.Context, o Disk) error {
	if disk.FormatOf(o.Path) == disk.Raw {
		return d.copy(ctx, o)
	}
	return disk.CreateOverlay(ctx, disk.Overlay{
		Path: o.Path, Base: o.Base, BaseFormat: o.BaseFormat, BaseName: d.nameOf(o.Base), Size: o.Size, Replace: o.Replace, Sync: o.Sync,
	})
}

// copy makes a raw disk. Its base may be removed as soon as it is open.
func (d *Disks) copy(ctx context.Context, o Disk) error {
	if o.BaseFormat != disk.Raw {
		return fmt.Errorf("make disk %s: it is to be raw, and %s is %s", o.Path, o.Base, o.BaseFormat)
	}
	if err := d.RoomFor(o.Base, filepath.Dir(o.Path)); err != nil {
		return fmt.Errorf("make disk %s: %w", o.Path, err)
	}
	return disk.Copy(ctx, disk.CopyOptions{Path: o.Path, Base: o.Base, Size: o.Size, Sectors: true, Replace: o.Replace, Sync: o.Sync})
}

// RoomFor returns an error if there is no room for a copy of a raw disk in a directory. One
// that shares blocks takes none.
func (d *Disks) RoomFor(path, dir string) error {
	if d.Room == nil || disk.Shares(dir) {
		return nil
	}
	bytes, err := disk.Allocated(path)
	if err != nil {
		return err
	}
	return d.Room(bytes)
}

// Derive writes down the base of an overlay, and makes it. A raw disk is only made.
func (d *Disks) Derive(ctx context.Context, o Disk) error {
	if disk.FormatOf(o.Path) == disk.Raw {
		return d.copy(ctx, o)
	}
	unlock, err := d.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := d.refs.Add(ctx, o.Path, o.Base); err != nil {
		return err
	}
	return d.Create(ctx, o)
}

// Persist writes a disk, and its name, to stable storage.
func (d *Disks) Persist(path string) error {
	file, err := os.Open(path)
	if err == nil {
		err = errors.Join(file.Sync(), file.Close(), durable.Sync(filepath.Dir(path)))
	}
	if err != nil {
		return fmt.Errorf("write disk out: %w", err)
	}
	return nil
}

// nameOf returns the name by which a header has a base.
func (d *Disks) nameOf(base string) string {
	name := d.dir.Rel(base)
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join("..", name)
}

// ourFile matches the names of files that others are based on, within a data directory.
var ourFile = regexp.MustCompile(`/(layers/[^/]+\.qcow2|images/[0-9a-f]{64}/rootfs(?:-small)?)$`)

// resolve returns the path of the base that a header of one of our own disks names. Until
// version 3 of the database it was absolute, and may still name the place where this data
// directory was, or the directory that this is a copy of.
func (d *Disks) resolve(name string) (string, error) {
	if !filepath.IsAbs(name) {
		inner, ok := strings.CutPrefix(name, "../")
		if !ok || !filepath.IsLocal(inner) {
			return "", fmt.Errorf("is based on %q, which is no name within the data directory", name)
		}
		return d.dir.Abs(inner), nil
	}
	if match := ourFile.FindStringSubmatch(name); match != nil {
		here := d.dir.Abs(match[1])
		if _, err := os.Lstat(here); err == nil {
			return here, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return name, nil
}

// baseOf returns what one of our own disks is based on; its path is empty if that is
// nothing. No guest writes the header of such a file.
func (d *Disks) baseOf(path, format string) (File, error) {
	info, err := disk.Inspect(path, format)
	if err != nil && !errors.Is(err, disk.ErrNoFileSystem) || info.Backing == "" {
		return File{}, ignoreNoFileSystem(err)
	}
	base := File{Format: info.BackingFormat}
	if base.Path, err = d.resolve(info.Backing); err != nil {
		return File{}, fmt.Errorf("%s: %w", path, err)
	}
	return base, nil
}

// baseOfOwn is baseOf of a disk whose name declares its format. One that is raw is not looked
// at: a guest has written it, or it is not made yet.
func (d *Disks) baseOfOwn(path string) (File, error) {
	if disk.FormatOf(path) == disk.Raw {
		return File{}, nil
	}
	return d.baseOf(path, disk.QCOW2)
}

func ignoreNoFileSystem(err error) error {
	if errors.Is(err, disk.ErrNoFileSystem) {
		return nil
	}
	return err
}

// maxChain bounds a chain: each file is one that the VMM has open.
const maxChain = 256

// Chain returns the files that one of our own disks is based on, the nearest first. Declared
// is the user's file that the last of our own is based on, if it is, and what that is based
// on in turn. A file that is neither ours nor declared must not lead to others.
func (d *Disks) Chain(path string, declared ...File) ([]File, error) {
	chain, err := d.walk(path, declared)
	if err != nil || len(chain) == 0 {
		return chain, err
	}
	last := chain[len(chain)-1]
	if !d.isUsers(last.Path, declared) {
		return chain, nil
	}
	var below []File
	if len(declared) > 0 && declared[0].Path == last.Path {
		below = declared[1:]
	}
	info, below, err := disk.DeclareChain(last, below)
	if ignoreNoFileSystem(err) != nil {
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	chain[len(chain)-1].Device = info.Device
	return append(chain, below...), nil
}

// isUsers reports whether a file is a user's: its base is the one that the user has named, and
// not the one in its header.
func (d *Disks) isUsers(path string, declared []File) bool {
	return d.dir.Rel(path) == path || len(declared) > 0 && declared[0].Path == path
}

// walk returns the files that one of our own disks is based on, up to the first that is a
// user's.
func (d *Disks) walk(path string, declared []File) ([]File, error) {
	var chain []File
	at := File{Path: path, Format: disk.FormatOf(path)}
	if at.Format == disk.Raw {
		return nil, nil
	}
	for {
		base, err := d.baseOf(at.Path, at.Format)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", path, err)
		}
		if base.Path == "" {
			return chain, nil
		}
		if len(chain) == maxChain {
			return nil, fmt.Errorf("disk %s: more than %d files are based on each other", path, maxChain)
		}
		chain = append(chain, base)
		if d.isUsers(base.Path, declared) {
			return chain, nil
		}
		at = base
	}
}

// IsOurs reports whether a file is a disk that this data directory has made for a VM: no
// guest has written its header. It may be retained from a VM that is gone.
func (d *Disks) IsOurs(ctx context.Context, path string) (bool, error) {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil || dir != d.dir.Disks() || !strings.HasSuffix(path, overlaySuffix) {
		return false, nil //nolint:nilerr // what can't be found is not ours
	}
	return d.refs.IsBased(ctx, filepath.Join(dir, filepath.Base(path)))
}

// List returns the paths of the disks of VMs, retained ones too.
func (d *Disks) List() ([]string, error) {
	paths, err := list(d.dir.Disks())
	return slices.DeleteFunc(paths, func(path string) bool {
		return !isLayer(path) || strings.HasPrefix(filepath.Base(path), disk.TempPrefix)
	}), err
}

// Root returns the file that the chain of a disk ends with, or the first that is a user's.
func (d *Disks) Root(path string) (string, error) {
	chain, err := d.walk(path, nil)
	if err != nil || len(chain) == 0 {
		return path, err
	}
	return chain[len(chain)-1].Path, nil
}

// Adopt writes down the base of a disk for another name that the disk has, or is about to
// get.
func (d *Disks) Adopt(ctx context.Context, path, name string) error {
	if disk.FormatOf(name) == disk.Raw {
		return nil
	}
	base, err := d.baseOfOwn(path)
	if err != nil || base.Path == "" {
		return err
	}
	return d.refs.Add(ctx, name, base.Path)
}

// AddLayer makes a disk a layer as well. The lock must be held.
func (d *Disks) AddLayer(ctx context.Context, path, name string) error {
	layer := d.dir.Layer(name, disk.FormatOf(path))
	err := d.Adopt(ctx, path, layer)
	if err == nil {
		err = os.Link(path, layer)
	}
	if err == nil {
		err = durable.Sync(d.dir.Layers())
	}
	if err != nil {
		return fmt.Errorf("keep disk: %w", err)
	}
	return nil
}

// DropUnused removes a qcow2 layer that is just another name of a disk, as the saving for which
// it was made has failed before the VM got an overlay of it.
func (d *Disks) DropUnused(ctx context.Context, name, diskPath string) error {
	unlock, err := d.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	path := d.dir.Layer(name, disk.QCOW2)
	layer, err := os.Stat(path)
	if err != nil {
		return err
	}
	current, err := os.Stat(diskPath)
	if err != nil || !os.SameFile(layer, current) {
		return err
	}
	return os.Remove(path)
}
