package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/budget"
	"github.com/smolvm/smolvm/internal/catalog"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/distroimage"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/host"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/image/kernelbuild"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/snapshot"
	"github.com/smolvm/smolvm/internal/start"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/template"
	"github.com/smolvm/smolvm/internal/vmm/traits"
	"github.com/smolvm/smolvm/internal/warmpool"
)

// The contract that the Manager keeps.
var _ smolvm.Service = (*Manager)(nil)

// Manager manages the VMs of one data directory. It is safe for use by any number
// of goroutines, beside any number of Managers in other processes.
type Manager struct {
	dir                *datadir.Dir
	dataDir, socketDir string
	known              traits.List
	backend            string // of VMs that don't name one; see resolveBackend
	config             Config

	budget *budget.Budget
	store  *store.Store
	disks  *backing.Disks
	images *image.Store
	// catalog finds images in their store and in that of OCI images.
	catalog *catalog.Catalog
	// packaged builds images of the distribution's packages.
	packaged *distroimage.Images
	// kernels builds kernels for guests.
	kernels *kernelbuild.Store
	host    *host.Host
	// machines says what a VMM is to run for a VM.
	machines *machine.Builder

	snapshots *snapshot.Store
	templates *template.Templates
	pools     *warmpool.Pools
	starter   *start.Starter

	locks flock.Queue // those who wait for the lock of a VM

	// actor names this process in events.
	actor string
	// bootID names the host's present boot, which is that of this process; empty if that
	// can't be found out.
	bootID func() string

	mu      sync.Mutex // guards the following
	clients map[string]*guestClient
	owned   map[string]*os.File // see own
	closed  bool
}

// Open opens the data directory, making it if it is missing.
func Open(ctx context.Context, config Config) (*Manager, error) {
	if len(os.Args) > 1 && os.Args[1] == shim.Argument {
		// Else it would start itself again and again.
		return nil, errors.New("this program was started as the shim of a VM, but its main does not call shim.Main first (package github.com/smolvm/smolvm/shim)")
	}
	return open(ctx, config)
}

func open(ctx context.Context, config Config) (*Manager, error) {
	socketDir, err := datadir.LocateSockets(config.SocketDir)
	if err != nil {
		return nil, err
	}
	known := config.backends
	if known == nil {
		known = traits.All()
	}
	backend, err := resolveBackend(known, config.Backend)
	if err != nil {
		return nil, err
	}
	limits, err := budget.Limits{Bytes: config.DiskBudget, Reserve: config.DiskReserve}.FromEnv()
	if err != nil {
		return nil, err
	}
	imageBytes, err := config.imageBytes()
	if err != nil {
		return nil, err
	}
	dir, err := datadir.Open(datadir.Options{Path: config.DataDir, Existing: config.Existing})
	if err != nil {
		return nil, err
	}
	images, err := image.Open(dir.Images())
	if err != nil {
		return nil, err
	}
	templates, err := snapshot.Open(dir.Templates())
	if err != nil {
		return nil, err
	}
	snapshots, err := snapshot.Open(dir.Snapshots())
	if err != nil {
		return nil, err
	}
	state, err := store.Open(ctx, dir.Database(), store.Options{MakeRoom: dir.MakeRoom})
	if err != nil {
		return nil, err
	}
	if err := settleDir(ctx, dir, state); err != nil {
		return nil, errors.Join(fmt.Errorf("data directory %s: %w", dir.Root(), err), state.Close())
	}
	m := &Manager{
		dir:       dir,
		disks:     backing.New(dir, state.Bases()),
		dataDir:   dir.Root(),
		socketDir: socketDir,
		known:     known,
		backend:   backend,
		config:    config,
		store:     state,
		images:    images,
		snapshots: snapshots,
		host:      host.New(host.Options{CacheDir: dir.Cache()}),
		actor:     fmt.Sprintf("%s[%d]", filepath.Base(os.Args[0]), os.Getpid()),
		clients:   map[string]*guestClient{},
		owned:     map[string]*os.File{},
		bootID:    sync.OnceValue(readBootID),

		budget: &budget.Budget{Dir: dir, Limits: limits},
	}
	m.disks.Room = m.budget.CheckFor
	oci, err := ocistore.Open(dir.OCI(), ocistore.Limits{Room: m.budget.CheckFor})
	if err != nil {
		return nil, errors.Join(err, state.Close())
	}
	m.catalog = &catalog.Catalog{Bootable: images, OCI: oci, Base: m.baseImage, IsBuiltIn: distro.IsBuiltIn, MaxBytes: imageBytes, InUse: m.imageInUse}
	m.packaged = m.newPackaged(m.catalog)
	m.kernels = &kernelbuild.Store{Dir: m.dir.Kernels(), Open: m.openPackages}
	m.wire(templates)
	return m, nil
}

// wire gives each room of the engine what it needs of the others.
func (m *Manager) wire(templates *snapshot.Store) {
	m.machines = &machine.Builder{Dir: m.dir, Images: m.images, Disks: m.disks, Store: m.store, Host: m.host, Backends: m.known}
	m.templates = &template.Templates{
		Dir: m.dir, Saved: templates, Disks: m.disks, Machines: m.machines, Budget: m.budget,
		Program: m.shimCommand, HostBootID: m.bootID,
		LogPath: m.workerLog(), MaxBytes: m.config.templateBytes(), Note: m.note,
	}
	m.pools = &warmpool.Pools{
		Dir: m.dir, Store: m.store, Disks: m.disks, Machines: m.machines, Templates: m.templates, Budget: m.budget,
		RuntimeDir: m.runtimeDir, Program: m.shimCommand, HostBootID: m.bootID, EnsureTemplate: m.BuildTemplate,
	}
	m.starter = &start.Starter{
		Dir: m.dir, Store: m.store, Disks: m.disks, Machines: m.machines, Templates: m.templates, Pools: m.pools,
		Turns: start.NewTurns(m.dir, m.config.maxStarts()), Guests: guests{m}, Background: background{m},
		OnlyBoot: !m.config.usesTemplates(), Accelerator: m.accelerator,
		RuntimeDir: m.runtimeDir, Program: m.shimCommand, HostBootID: m.bootID, ClientKey: m.clientSigner,
	}
}

// VM returns a handle of the VM of that id, which need not be there yet.
func (m *Manager) VM(id string) smolvm.VM { return smolvm.VM{Service: m, ID: id} }

// Run is [smolvm.Run] by this Manager.
func (m *Manager) Run(ctx context.Context, config smolvm.VMConfig, command smolvm.Command) (smolvm.Result, error) {
	return smolvm.Run(ctx, m, config, command)
}

// Close lets go of the database and of connections to guests. VMs go on running.
// Closing again does nothing.
func (m *Manager) Close() error {
	m.mu.Lock()
	clients, owned := m.clients, m.owned
	m.clients, m.owned = nil, nil
	closed := m.closed
	m.closed = true
	m.mu.Unlock()
	if closed {
		return nil
	}
	for _, client := range clients {
		client.close()
	}
	for _, file := range owned {
		_ = file.Close()
	}
	return m.store.Close()
}

// DataDir is the directory of the state database and of all that belongs to VMs.
func (m *Manager) DataDir() string { return m.dataDir }

// SocketDir is the directory for sockets of running VMs.
func (m *Manager) SocketDir() string { return m.socketDir }

// DiskDir is the directory of the VMs' own disks.
func (m *Manager) DiskDir() string { return m.dir.Disks() }

// findProgram finds one of our own programs: beside the running one, or in PATH.
func findProgram(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find program %s beside this one or in PATH: %w", name, err)
	}
	return filepath.Abs(path)
}

// note records an event; see [teardown.Site.Note].
func (m *Manager) note(ctx context.Context, id, action string, began time.Time, detail string) {
	m.site().Note(ctx, id, action, began, detail)
}
