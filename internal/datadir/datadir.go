// Package datadir knows the data directory: where it is, whose it is, which one it is, and
// the name of everything in it.
//
//	smolvm.db         the state database
//	directory.json    the directory's identity; see [Dir.ID]
//	disks/            the VMs' own disks, retained ones too
//	layers/           disks that other disks are based on
//	images/           images by digest
//	kernels/          kernels that were built for guests
//	oci/              OCI images: layers, manifests and names
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
	kernelsName   = "kernels"
	ociName       = "oci"
	templatesName = "templates"
	snapshotsName = "snapshots"
	poolName      = "pool"
	vmsName       = "vms"
	keysName      = "keys"
	locksName     = "locks"
	cacheName     = "cache"
	networksName  = "networks.json"
)

// Modes of what is made in the directory: nobody else may read guests' memory, disks and
// keys.
const (
	dirMode  = 0o700
	fileMode = 0o600
)

// Dir is a data directory.
type Dir struct {
	Layout

	id     string
	copied bool
	note   string
}

// ID returns a name that no other directory on this host has, nor a copy of this one. It stays
// the same when the directory is renamed.
func (d *Dir) ID() string { return d.id }

// Note says in a sentence what is unusual about the directory; empty if nothing is.
func (d *Dir) Note() string { return d.note }

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
