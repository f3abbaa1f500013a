package manager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/image/ociconfig"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Create reserves all that a VM needs and makes its disk, but does not start it. A disk that is
// a copy, as the VM's backend has no overlays, is made by the first start.
// If the VM's image is missing, it is built first if it is the default one, and else pulled; see
// [smolvm.CreateOptions]. What the configuration leaves to an OCI image is filled in from that.
//
// The error matches [smolvm.ErrVMAlreadyExists] if the id is taken, or is a
// [*smolvm.ValidationError] that names every bad field, or a
// [*smolvm.NetworkError], or matches [smolvm.ErrDiskBudget].
func (m *Manager) Create(ctx context.Context, config smolvm.VMConfig, opts smolvm.CreateOptions) (smolvm.VMInfo, error) {
	info, err := m.createNew(ctx, config, opts)
	if opts.Reuse && config.ID != "" && errors.Is(err, smolvm.ErrVMAlreadyExists) {
		return m.reuse(ctx, config)
	}
	return info, err
}

// createNew is Create of a VM that is not there.
func (m *Manager) createNew(ctx context.Context, config smolvm.VMConfig, opts smolvm.CreateOptions) (smolvm.VMInfo, error) {
	began := time.Now()
	if config.ID == "" {
		config.ID = smolvm.NewID()
	}
	config = config.WithDefaults()
	backend, root, err := m.check(&config)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	config.Backend = backend.Name
	// Before an image is built for a VM that can't be made.
	if _, err := m.store.GetVM(ctx, config.ID); err == nil {
		return smolvm.VMInfo{}, fmt.Errorf("create %q: %w; choose another id, or delete it first", config.ID, smolvm.ErrVMAlreadyExists)
	}
	if err := m.budget.Check(); err != nil {
		return smolvm.VMInfo{}, fmt.Errorf("create %q: %w", config.ID, err)
	}
	var digest string
	if config.UsesImage() {
		image, err := m.ensureImage(ctx, config.Image, opts.Pull, opts.Progress)
		if err != nil {
			return smolvm.VMInfo{}, fmt.Errorf("create %q: %w", config.ID, err)
		}
		if config, err = withImage(config, image); err != nil {
			return smolvm.VMInfo{}, fmt.Errorf("create %q: %w", config.ID, err)
		}
		digest = image.Digest
		release, err := m.images.Hold(digest) // until the VM's row says that it is used
		if err != nil {
			return smolvm.VMInfo{}, fmt.Errorf("create %q: %w", config.ID, err)
		}
		defer release()
		if root, err = disk.Inspect(machine.Rootfs(image, config.DiskSizeMiB), disk.Raw); err != nil {
			return smolvm.VMInfo{}, fmt.Errorf("create %q: image %s: %w", config.ID, config.Image, err)
		}
	}
	if err := checkDiskSize(config, root); err != nil {
		return smolvm.VMInfo{}, err
	}
	for i, mount := range config.Mounts {
		if mount.Mode == smolvm.MountOverlay {
			config.Mounts[i].Since = began.UTC()
		}
	}
	checked := time.Since(began)
	vm, phases, err := m.make(ctx, config, backend, origin{image: digest})
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	m.note(ctx, vm.ID, "create", began, "")
	m.dir.KeepReserve()
	info := m.info(vm)
	info.Timeline = append([]smolvm.Phase{{Name: "check", Duration: checked}}, phases...)
	return info, nil
}

// withImage fills in what a configuration leaves to its image.
func withImage(config smolvm.VMConfig, image smolvm.Image) (smolvm.VMConfig, error) {
	if image.Config != nil {
		var err error
		if config, err = ociconfig.Apply(config, *image.Config); err != nil {
			return config, err
		}
	}
	config, err := ociconfig.ApplyHealth(config, image.Config)
	return ociconfig.ApplyInit(config, image.BootArgs), err
}

// origin is what a VM is made of.
type origin struct {
	image string // its digest
	layer string // as in [store.VM]
	// within is the egress policy that none of the VM's may go beyond, as in [store.VM].
	within string
}

// create makes a VM of an image whose disk is to be made over the disk of a snapshot.
func (m *Manager) create(ctx context.Context, config smolvm.VMConfig, from origin) (store.VM, error) {
	began := time.Now()
	backend, _, err := m.check(&config)
	if err != nil {
		return store.VM{}, err
	}
	if format := disk.FormatOf(from.layer); from.layer != "" && format != backend.DiskFormats[0] {
		return store.VM{}, fmt.Errorf("create %q: %w", config.ID, machine.UnusableFormat(backend, from.layer, format))
	}
	release, err := m.images.Hold(from.image)
	if err != nil {
		return store.VM{}, fmt.Errorf("create %q: %w", config.ID, err)
	}
	defer release()
	config.Backend = backend.Name
	vm, _, err := m.make(ctx, config, backend, from)
	if err != nil {
		return store.VM{}, err
	}
	m.note(ctx, vm.ID, "create", began, "")
	return vm, nil
}

// make makes the VM's row and its disk: both or neither.
func (m *Manager) make(ctx context.Context, config smolvm.VMConfig, backend vmm.Traits, from origin) (store.VM, []smolvm.Phase, error) {
	began := time.Now()
	lock, err := m.lock(ctx, config.ID)
	if err != nil {
		return store.VM{}, nil, err
	}
	vm, err := m.reserve(ctx, config, backend, from)
	if err != nil {
		if errors.Is(err, smolvm.ErrVMAlreadyExists) {
			lock.unlock()
		} else {
			lock.remove()
		}
		return store.VM{}, nil, err
	}
	step.Reached(ctx, "create/reserved")
	reserved := time.Now()
	err = m.machines.EnsureDisk(ctx, vm)
	step.Reached(ctx, "create/disk")
	if err == nil && config.Ephemeral {
		err = m.own(vm.ID)
	}
	if err != nil {
		err = errors.Join(err, m.erase(context.WithoutCancel(ctx), vm))
		lock.remove()
		return store.VM{}, nil, fmt.Errorf("create %q: %w", config.ID, err)
	}
	lock.unlock()
	return vm, []smolvm.Phase{
		{Name: "network", Duration: reserved.Sub(began)}, // its leases: address and ports
		{Name: "disk", Duration: time.Since(reserved)},
	}, nil
}

// check validates a configuration, and looks at the files that it names. It fills in the
// formats of disks, which are decided here and stay as they are, and reports all that is
// wrong at once.
func (m *Manager) check(config *smolvm.VMConfig) (vmm.Traits, disk.Info, error) {
	invalid := &smolvm.ValidationError{ID: config.ID}
	if err := config.Validate(); err != nil && !errors.As(err, &invalid) {
		return vmm.Traits{}, disk.Info{}, err
	}
	bad := func(field string, err error) {
		if slices.ContainsFunc(invalid.Fields, func(f smolvm.FieldError) bool { return f.Field == field }) {
			return // one problem of a field is enough
		}
		invalid.Fields = append(invalid.Fields, smolvm.FieldError{Field: field, Problem: err.Error()})
	}
	var code smolvm.Code
	var hint string
	if config.CPULimit > 0 {
		if err := cgroup.Find("/").Why(cgroup.CPU); err != nil {
			hint = "`smolvm doctor` says what bounds VMs on this host"
			bad("cpu_limit", fmt.Errorf("this host can't limit it: %w", err))
		}
	}
	if config.KernelPath != "" {
		if _, err := m.images.Kernel(context.Background(), config.KernelPath); err != nil {
			bad("kernel_path", err)
		}
	}
	if config.InitrdPath != "" {
		if err := m.images.CheckInitramfs(config.InitrdPath); err != nil {
			bad("initrd_path", err)
		}
	}
	var root disk.Info
	var files []broughtDisk
	if config.RootfsPath != "" {
		var err error
		if root, _, err = machine.Declare(machine.RootDrive(*config)); err != nil {
			bad("rootfs_path", err)
		}
		config.RootfsFormat = smolvm.DiskFormat(root.Format)
		files = append(files, broughtDisk{"rootfs_path", config.RootfsPath, root.Format})
	}
	for i, drive := range config.Drives {
		found, err := m.machines.Users(drive)
		if err != nil {
			hint = cmp.Or(hint, smolvm.HintOf(err))
			bad(fmt.Sprintf("drives[%d].path", i), err)
		}
		config.Drives[i].Format = smolvm.DiskFormat(found.Format)
		files = append(files, broughtDisk{fmt.Sprintf("drives[%d].path", i), drive.Path, found.Format})
	}
	if _, err := ociconfig.ParseSignal(config.StopSignal); err != nil {
		bad("stop_signal", err)
	}
	hint = cmp.Or(hint, m.checkMounts(*config, bad))
	retained := m.retainedFormat(*config)
	backend, err := m.backendFor(context.Background(), config.Backend, needsOf(files, retained))
	switch {
	case errors.Is(err, smolvm.ErrUnknownBackend):
		code, hint = smolvm.CodeUnknownBackend, smolvm.HintOf(err)
		bad("backend", err)
	case err != nil:
		return vmm.Traits{}, disk.Info{}, err
	default:
		hint = cmp.Or(hint, m.checkFormats(backend, *config, files, retained, bad))
	}
	if err := checkNetwork(*config); err != nil && len(invalid.Fields) == 0 {
		return vmm.Traits{}, disk.Info{}, err
	}
	if err := checkEgress(*config); err != nil {
		var wrong *smolvm.ValidationError
		if !errors.As(err, &wrong) {
			return vmm.Traits{}, disk.Info{}, err
		}
		invalid.Fields = append(invalid.Fields, wrong.Fields...)
	}
	for i, line := range config.AuthorizedKeys {
		if _, err := identity.ParseAuthorizedKey(line); err != nil {
			bad(fmt.Sprintf("authorized_keys[%d]", i), err)
		}
	}
	if len(invalid.Fields) > 1 {
		code = ""
	}
	if len(invalid.Fields) > 0 {
		return vmm.Traits{}, disk.Info{}, &smolvm.Error{Code: code, Hint: hint, Err: invalid}
	}
	return backend, root, nil
}

func checkDiskSize(config smolvm.VMConfig, root disk.Info) error {
	if config.DiskSizeMiB == 0 || config.DiskSizeMiB<<20 >= root.VirtualSize {
		return nil
	}
	return &smolvm.ValidationError{ID: config.ID, Fields: []smolvm.FieldError{{
		Field: "disk_size_mib",
		Problem: fmt.Sprintf("%d MiB is smaller than the root file system; use at least %d",
			config.DiskSizeMiB, (root.VirtualSize+1<<20-1)>>20),
	}}}
}

// reserve makes the VM's row with all its leases, in one transaction.
func (m *Manager) reserve(ctx context.Context, config smolvm.VMConfig, backend vmm.Traits, from origin) (store.VM, error) {
	hostKey, err := identity.NewHostKey(config.ID)
	if err != nil {
		return store.VM{}, err
	}
	path := m.diskPath(config, backend)
	base := from.layer
	switch {
	case from.layer != "":
		// If there is a VM of that id, it is its disk.
		if _, err := m.store.GetVM(ctx, config.ID); errors.Is(err, smolvm.ErrVMNotFound) {
			if err := refuseRetained(path); err != nil {
				return store.VM{}, fmt.Errorf("create %q: %w", config.ID, err)
			}
		}
	case path != "" && path != config.RootfsPath && disk.FormatOf(path) != disk.Raw:
		if base, _, err = m.machines.UsualBase(ctx, config, from.image); err != nil {
			return store.VM{}, err
		}
	}
	pool, err := m.poolFor(ctx, config)
	if err != nil {
		return store.VM{}, err
	}
	var lastLease int
	if pool.IsValid() {
		lastLease = network.LastLease(pool)
	}
	vm, err := m.store.CreateVM(ctx, store.NewVM{
		Config:    config,
		Image:     from.image,
		Backend:   backend.Name,
		DiskPath:  path,
		Layer:     from.layer,
		Base:      base,
		LogPath:   m.dir.Console(config.ID),
		MachineID: identity.NewMachineID(),
		HostKey:   hostKey,
		PortFree:  shim.PortFree,
		Pool:      pool,
		LastLease: lastLease,

		EgressWithin: from.within,
	})
	switch {
	case err == nil:
		return vm, nil
	case errors.Is(err, smolvm.ErrVMAlreadyExists):
		return store.VM{}, fmt.Errorf("create %q: %w; choose another id, or delete it first", config.ID, smolvm.ErrVMAlreadyExists)
	case errors.Is(err, smolvm.ErrPortInUse):
		return store.VM{}, &smolvm.NetworkError{ID: config.ID, Op: "reserve host port", Err: err}
	}
	return store.VM{}, fmt.Errorf("create %q: %w", config.ID, exhausted(pool, err))
}

// refuseRetained fails if there is a disk already where one is to be made over the disk of
// a snapshot: what it holds would be lost, or taken for what the snapshot holds.
func refuseRetained(path string) error {
	_, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("find disk: %w", err)
	}
	return fmt.Errorf("the disk of an earlier VM of that id was retained: %s; choose another id, or move it away", path)
}

// diskPath is where the VM's root disk is: its own, or in shared mode the root
// file system itself. A VM without a root file system has none. The format of its own is
// decided here for ever: the best that its backend can use, which is that of the disk of a
// snapshot, too.
func (m *Manager) diskPath(config smolvm.VMConfig, backend vmm.Traits) string {
	if !hasOwnDisk(config) {
		return config.RootfsPath
	}
	return m.dir.Disk(config.ID, backend.DiskFormats[0])
}

// hasOwnDisk reports whether a VM has a disk that is its own.
func hasOwnDisk(config smolvm.VMConfig) bool {
	return config.DiskMode != smolvm.DiskShared && (config.UsesImage() || config.RootfsPath != "")
}
