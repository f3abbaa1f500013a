// Package datadir knows the data directory: where it is, whose it is, which one it is, and
// the name of everything in it.
//
//	smolvm.db         the state database
//	directory.json    the directory's identity; see [Dir.ID]
//	disks/            the VMs' own disks, retained ones too
//	layers/           disks that other disks are based on
//	images/           images by digest
//	templates/        saved VMs, by kind
//	snapshots/        saved VMs, by name
//	pool/<kind>/<n>/  VMs that stand by
//	vms/<id>/         logs of a VM, and its known_hosts
//	keys/             the key that logs in to guests
//	locks/<id>        held by whoever changes a VM
//	cache/            what can be made again
//
// A data directory can be renamed, moved, copied and restored from a backup: nothing in
// it says where it is, and a copy is a directory of its own.
package datadir

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
)

// Names in the directory.
const (
	databaseName  = "smolvm.db"
	identityName  = "directory.json"
	disksName     = "disks"
	layersName    = "layers"
	imagesName    = "images"
	templatesName = "templates"
	snapshotsName = "snapshots"
	poolName      = "pool"
	vmsName       = "vms"
	keysName      = "keys"
	locksName     = "locks"
	cacheName     = "cache"
)

// Modes of what is made in the directory: nobody else may read guests' memory, disks and
// keys.
const (
	dirMode  = 0o700
	fileMode = 0o600
)

// Dir is a data directory.
type Dir struct {
	root   string
	id     string
	copied bool
	note   string
}

// Root returns the directory's real path: absolute, and without symbolic links.
func (d *Dir) Root() string { return d.root }

// ID returns a name that no other directory on this host has, nor a copy of this one. It stays
// the same when the directory is renamed.
func (d *Dir) ID() string { return d.id }

// Note says in a sentence what is unusual about the directory; empty if nothing is.
func (d *Dir) Note() string { return d.note }

// Database returns the path of the state database.
func (d *Dir) Database() string { return d.path(databaseName) }

// Disks returns the directory of the VMs' own disks.
func (d *Dir) Disks() string { return d.path(disksName) }

// Disk returns the path of the disk of a VM, whose format is the file name's ending.
func (d *Dir) Disk(id, format string) string { return d.path(disksName, id+"."+format) }

// Layers returns the directory of the disks that others are based on.
func (d *Dir) Layers() string { return d.path(layersName) }

// Layer returns the path of a layer.
func (d *Dir) Layer(name string) string { return d.path(layersName, name+".qcow2") }

// LayersLock returns the path of the lock that is held while a disk gets a base or loses it.
func (d *Dir) LayersLock() string { return d.path(layersName, ".lock") }

// Images returns the directory of the image store.
func (d *Dir) Images() string { return d.path(imagesName) }

// Templates returns the directory of the templates.
func (d *Dir) Templates() string { return d.path(templatesName) }

// Snapshots returns the directory of the snapshots.
func (d *Dir) Snapshots() string { return d.path(snapshotsName) }

// Pools returns the directory of the pools.
func (d *Dir) Pools() string { return d.path(poolName) }

// Pool returns the directory of one pool.
func (d *Dir) Pool(kind string) string { return d.path(poolName, kind) }

// VMs returns the directory of the VMs' logs.
func (d *Dir) VMs() string { return d.path(vmsName) }

// VM returns the directory of the logs of one VM.
func (d *Dir) VM(id string) string { return d.path(vmsName, id) }

// Console returns the path of the log of a VM's console.
func (d *Dir) Console(id string) string { return d.path(vmsName, id, "console.log") }

// Keys returns the directory of the keys.
func (d *Dir) Keys() string { return d.path(keysName) }

// Locks returns the directory of the VMs' locks.
func (d *Dir) Locks() string { return d.path(locksName) }

// Lock returns the path of one lock.
func (d *Dir) Lock(name string) string { return d.path(locksName, name) }

// Cache returns the directory of files that can be made again.
func (d *Dir) Cache() string { return d.path(cacheName) }

func (d *Dir) path(parts ...string) string {
	return filepath.Join(append([]string{d.root}, parts...)...)
}

// Rel returns the name of a file within the directory, which is what is kept of it: it
// stays right when the directory moves. What is outside keeps its absolute path.
func (d *Dir) Rel(path string) string { return Rel(d.root, path) }

// Abs returns the path of a file from its name as [Dir.Rel] gives it.
func (d *Dir) Abs(name string) string { return Abs(d.root, name) }

// Rel is [Dir.Rel] for a directory that is at root.
func Rel(root, path string) string {
	if inside, ok := strings.CutPrefix(path, root+string(filepath.Separator)); ok {
		return inside
	}
	return path
}

// Abs is [Dir.Abs] for a directory that is at root.
func Abs(root, name string) string {
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(root, name)
}

// prepare makes the directories that are always there.
func (d *Dir) prepare() error {
	for _, name := range []string{cacheName, disksName, layersName, locksName, poolName, vmsName} {
		if err := os.MkdirAll(d.path(name), dirMode); err != nil {
			return err
		}
	}
	return nil
}

// shortHash returns a name of idDigits for a text.
func shortHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])[:idDigits]
}
