package datadir

import "path/filepath"

// Layout names the files and directories of a data directory.
type Layout struct{ root string }

// Root returns the directory's real path: absolute, and without symbolic links.
func (l Layout) Root() string { return l.root }

// Database returns the path of the state database.
func (l Layout) Database() string { return l.path(databaseName) }

// Disks returns the directory of the VMs' own disks.
func (l Layout) Disks() string { return l.path(disksName) }

// Disk returns the path of the disk of a VM, whose format is the file name's ending.
func (l Layout) Disk(id, format string) string { return l.path(disksName, id+"."+format) }

// Layers returns the directory of the disks that others are based on, or copies of.
func (l Layout) Layers() string { return l.path(layersName) }

// Layer returns the path of a layer, whose format is the file name's ending.
func (l Layout) Layer(name, format string) string { return l.path(layersName, name+"."+format) }

// LayersLock returns the path of the lock that is held while a disk gets a base or loses it.
func (l Layout) LayersLock() string { return l.path(layersName, ".lock") }

// Images returns the directory of the image store.
func (l Layout) Images() string { return l.path(imagesName) }

// Kernels returns the directory of the kernels that were built for guests.
func (l Layout) Kernels() string { return l.path(kernelsName) }

// BuildCaches returns the directory of what builds of Dockerfiles keep in cache mounts.
func (l Layout) BuildCaches() string { return l.path(cacheName, "build") }

// OCI returns the directory of the store of OCI images.
func (l Layout) OCI() string { return l.path(ociName) }

// Templates returns the directory of the templates.
func (l Layout) Templates() string { return l.path(templatesName) }

// Snapshots returns the directory of the snapshots.
func (l Layout) Snapshots() string { return l.path(snapshotsName) }

// Pools returns the directory of the pools.
func (l Layout) Pools() string { return l.path(poolName) }

// Pool returns the directory of one pool.
func (l Layout) Pool(kind string) string { return l.path(poolName, kind) }

// VMs returns the directory of the VMs' logs.
func (l Layout) VMs() string { return l.path(vmsName) }

// VM returns the directory of the logs of one VM.
func (l Layout) VM(id string) string { return l.path(vmsName, id) }

// Console returns the path of the log of a VM's console.
func (l Layout) Console(id string) string { return l.path(vmsName, id, "console.log") }

// Flows returns the path of a VM's flow log.
func (l Layout) Flows(id string) string { return l.path(vmsName, id, "flows.jsonl") }

// Keys returns the directory of the keys.
func (l Layout) Keys() string { return l.path(keysName) }

// Locks returns the directory of the VMs' locks.
func (l Layout) Locks() string { return l.path(locksName) }

// Lock returns the path of one lock.
func (l Layout) Lock(name string) string { return l.path(locksName, name) }

// Networks returns the path of what is kept of the networks of VMs beside their rows.
func (l Layout) Networks() string { return l.path(networksName) }

// NetworksLock returns the path of the lock of that file.
func (l Layout) NetworksLock() string { return l.path(cacheName, "networks.lock") }

// Cache returns the directory of files that can be made again.
func (l Layout) Cache() string { return l.path(cacheName) }

func (l Layout) path(parts ...string) string {
	return filepath.Join(append([]string{l.root}, parts...)...)
}
