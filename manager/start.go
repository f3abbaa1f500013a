package manager

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// guestSSHPort is where every guest's SSH server is, ours or its own.
	guestSSHPort = 22
	// emulationFactor is how many times longer things may take without hardware
	// virtualization; a kernel boots about ten times slower, a guest that is up
	// works about four times slower.
	emulationFactor = 4
)

// Start starts a VM that does not run, and returns when it is ready as its
// configuration says. The first start of a VM is a clone of a template of its kind, or
// a VM from a pool, if there is one; all others boot. [smolvm.VMInfo].Start tells which
// it was, and what kept it from being a faster one. A VM in [smolvm.StateError] boots from
// its disk, which is as after a power cut; a warning tells so.
//
// On failure nothing is left running. If the guest has run, the VM is in
// [smolvm.StateError], and the error quotes the end of its console log; otherwise the VM is
// in the state that it was in. [smolvm.VMInfo].Cause tells why in either case.
//
// The error matches [smolvm.ErrVMNotFound], [smolvm.ErrInvalidState] or
// [smolvm.ErrBootTimeout], or is a [*smolvm.NetworkError] or a
// [*smolvm.PrerequisiteError].
func (m *Manager) Start(ctx context.Context, id string, opts smolvm.StartOptions) (smolvm.VMInfo, error) {
	return m.startFrom(ctx, id, opts, nil, nil)
}

// startFrom is Start of a VM that is to go on from a saved guest, if that is not nil, and
// nothing is wrong with it.
func (m *Manager) startFrom(ctx context.Context, id string, opts smolvm.StartOptions, from *savedGuest, damage error) (smolvm.VMInfo, error) {
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	defer lock.unlock()
	return m.startLocked(ctx, vm, opts, from, damage)
}

// startLocked is startFrom for the holder of the VM's lock.
func (m *Manager) startLocked(ctx context.Context, vm store.VM, opts smolvm.StartOptions, from *savedGuest, damage error) (smolvm.VMInfo, error) {
	began, id := time.Now(), vm.ID
	if vm.State.Alive() {
		return smolvm.VMInfo{}, stateError("start", vm)
	}
	if err := errors.Join(m.requireBackend(ctx, vm.Backend), requireOpenFiles(), m.checkRoom()); err != nil {
		return smolvm.VMInfo{}, vmError("start", id, err)
	}
	if from != nil && damage != nil {
		damage = fmt.Errorf("%s %s: %w", from.method, from.source, damage)
	}
	vm, report, err := m.boot(ctx, vm, opts, from, damage)
	if err != nil {
		m.note(ctx, id, "start-failed", began, err.Error())
		return smolvm.VMInfo{}, err
	}
	m.note(ctx, id, "start", began, string(report.Method)+", "+vm.Accelerator)
	info := m.info(vm)
	info.Start = report
	return info, nil
}

// minOpenFiles is how many files a VM's shim and its VMM must be able to have open: some 40
// of their own, and two for each connection.
const minOpenFiles = 256

// requireOpenFiles fails if a VM would run out of files: its VMM would abort in the middle
// of its work.
func requireOpenFiles() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Max >= minOpenFiles {
		return nil //nolint:nilerr // then nobody knows of a limit
	}
	return &smolvm.Error{Hint: "raise the limit, as with `ulimit -n 1024`",
		Err: fmt.Errorf("a process may have only %d files open, and a VM needs %d", limit.Max, minOpenFiles)}
}

// failed writes down a start that did not succeed. A start that the caller gave up, or in
// which the guest did not run, leaves the VM in the state that it was in.
func (m *Manager) failed(ctx context.Context, vm store.VM, ran bool, cause error) error {
	err := vmError("start", vm.ID, cause)
	if ctx.Err() != nil && !errors.Is(cause, smolvm.ErrBootTimeout) {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if ran {
		return errors.Join(err, m.store.MarkFailed(ctx, vm.ID, cause.Error(), time.Now().UTC()))
	}
	return errors.Join(err, m.store.MarkNotStarted(ctx, vm.ID, vm.State, "its start failed: "+cause.Error()))
}

// prepare makes the directories of a start, and the shim's orders.
func (m *Manager) prepare(ctx context.Context, vm store.VM, opts smolvm.StartOptions) (shim.LaunchOptions, error) {
	command, err := m.shimCommand()
	if err != nil {
		return shim.LaunchOptions{}, vmError("start", vm.ID, err)
	}
	dir := m.vmDir(vm.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return shim.LaunchOptions{}, vmError("start", vm.ID, err)
	}
	if err := removeAll(dir, "*"+backing.OverlaySuffix); err != nil { // of a run that died while it was saved
		return shim.LaunchOptions{}, vmError("start", vm.ID, err)
	}
	runtimeDir := m.runtimeDir(vm.ID)
	if err := datadir.MakeRuntimeParent(runtimeDir); err != nil {
		return shim.LaunchOptions{}, vmError("start", vm.ID, err)
	}
	accelerator, err := m.accelerator(ctx, vm.Backend)
	if err != nil {
		return shim.LaunchOptions{}, vmError("start", vm.ID, err)
	}
	machine, err := m.vmmConfig(ctx, vm, accelerator)
	if err != nil {
		return shim.LaunchOptions{}, vmError("start", vm.ID, err)
	}
	plan := network.User(vm.Lease)
	attached := network.ConfigOf(plan)
	spec := shim.Spec{
		ID:           vm.ID,
		Run:          newRun(),
		Backend:      vm.Backend,
		VMM:          machine,
		Network:      &attached,
		Ready:        vm.Config.Ready,
		ReadyTimeout: bootTimeout(opts, accelerator),
		TTL:          vm.Config.TTL,
		WarmUp:       m.warmUpOf(vm),
		Ephemeral:    vm.Config.Ephemeral,
		RuntimeDir:   runtimeDir,
		Origin:       shim.Origin{DataDir: m.dataDir, State: vm.State},
	}
	if vm.Config.UsesImage() {
		if spec.Hello, err = m.hello(vm, plan); err != nil {
			return shim.LaunchOptions{}, vmError("start", vm.ID, err)
		}
	}
	return shim.LaunchOptions{
		Program: command,
		Spec:    spec,
		LogPath: filepath.Join(dir, "shim.log"),
	}, nil
}

// removeAll removes the files below dir that match a pattern.
func removeAll(dir, pattern string) error {
	paths, err := glob.In(dir, pattern)
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

func bootTimeout(opts smolvm.StartOptions, accelerator string) time.Duration {
	switch {
	case opts.Timeout != 0:
		return opts.Timeout
	case accelerator == vmm.KVM:
		return smolvm.DefaultBootTimeout
	default:
		return emulationFactor * smolvm.DefaultBootTimeout
	}
}

// vmmConfig says what the VMM is to run.
func (m *Manager) vmmConfig(ctx context.Context, vm store.VM, accelerator string) (vmm.Config, error) {
	config := vmm.Config{
		ID:          vm.ID,
		Accelerator: accelerator,
		VCPUs:       vm.Config.VCPUs,
		MemoryMiB:   vm.Config.MemoryMiB,
		CPULimit:    vm.Config.CPULimit,
		DiskLimit:   vmm.DiskLimit{BytesPerSecond: vm.Config.DiskBytesPerSecond, IOPS: vm.Config.DiskIOPS},
		Kernel:      vm.Config.KernelPath,
		Initrd:      vm.Config.InitrdPath,
		BootArgs:    vm.Config.BootArgs,
		NIC:         &vmm.NIC{MAC: network.User(vm.Lease).GuestMAC},
		Channel:     vm.Config.UsesImage(),
		ConsolePath: vm.LogPath,
		LogPath:     filepath.Join(m.vmDir(vm.ID), "vmm.log"),
	}
	var err error
	if vm.Config.UsesImage() {
		image, err := m.images.Get(ctx, vm.Image)
		if err != nil {
			return config, err
		}
		config.Kernel, config.Initrd = image.KernelPath, image.InitrdPath
		if config.BootArgs == "" {
			config.BootArgs = image.BootArgs
		}
	} else if config.Kernel, err = m.images.Kernel(ctx, config.Kernel); err != nil {
		return config, err
	}
	if vm.DiskPath != "" && !hasArg(config.BootArgs, "root") {
		config.BootArgs += " root=/dev/vda rw"
	}
	config.Drives, err = m.drives(vm)
	return config, err
}

// drives returns the disks of a VM, each with the files that it is based on. No format is
// taken from what a disk holds, which a guest may have written.
func (m *Manager) drives(vm store.VM) ([]vmm.Drive, error) {
	users := vm.Config.Drives
	var drives []vmm.Drive
	switch vm.DiskPath {
	case "":
	case vm.Config.RootfsPath:
		users = append([]smolvm.Drive{rootDrive(vm.Config)}, users...)
	default:
		root := rootDrive(vm.Config)
		own, err := m.ownDrive(vm.DiskPath, declaredFiles(append([]smolvm.DiskFile{{Path: root.Path, Format: root.Format}}, root.Backing...))...)
		if err != nil {
			return nil, err
		}
		drives = append(drives, own)
	}
	for _, drive := range users {
		found, err := m.usersDrive(drive)
		if err != nil {
			return nil, err
		}
		drives = append(drives, found)
	}
	return drives, nil
}

// usersDrive is a disk that the user names. One that is qcow2 is looked at each time, as it
// may have been another VM's raw one meanwhile. It may also be the disk of a VM of ours.
func (m *Manager) usersDrive(drive smolvm.Drive) (vmm.Drive, error) {
	if drive.Format != smolvm.FormatRaw {
		ours, err := m.disks.IsOurs(context.Background(), drive.Path)
		if err != nil {
			return vmm.Drive{}, err
		}
		if ours {
			if len(drive.Backing) > 0 {
				return vmm.Drive{}, fmt.Errorf("%s: it is the disk of a VM; what it is based on is known, and can't be named", drive.Path)
			}
			own, err := m.ownDrive(drive.Path)
			own.ReadOnly = drive.ReadOnly
			return own, err
		}
	}
	info, chain, err := declareDrive(drive)
	if errors.Is(err, disk.ErrNoFileSystem) {
		err = nil // an empty drive is fine: the guest may make a file system on it
	}
	return vmm.Drive{Path: drive.Path, Format: info.Format, ReadOnly: drive.ReadOnly, Device: info.Device, Backing: chainFiles(chain)}, err
}

// rootDrive is the root file system that the user brings.
func rootDrive(config smolvm.VMConfig) smolvm.Drive {
	return smolvm.Drive{Path: config.RootfsPath, Format: config.RootfsFormat, Backing: config.RootfsBacking}
}

// declareDrive looks at a disk that the user names, and what it is based on.
func declareDrive(drive smolvm.Drive) (disk.Info, []disk.File, error) {
	return disk.DeclareChain(disk.File{Path: drive.Path, Format: string(drive.Format)}, declaredFiles(drive.Backing))
}

func declaredFiles(files []smolvm.DiskFile) []disk.File {
	var declared []disk.File
	for _, file := range files {
		declared = append(declared, disk.File{Path: file.Path, Format: string(file.Format)})
	}
	return declared
}

func chainFiles(chain []disk.File) []vmm.DiskFile {
	var files []vmm.DiskFile
	for _, file := range chain {
		files = append(files, vmm.DiskFile(file))
	}
	return files
}

// ownDrive is a disk in the data directory, which is qcow2 as we have made it. Declared as
// for [backing.Disks.Chain].
func (m *Manager) ownDrive(path string, declared ...disk.File) (vmm.Drive, error) {
	chain, err := m.disks.Chain(path, declared...)
	return vmm.Drive{Path: path, Format: disk.QCOW2, Backing: chainFiles(chain)}, err
}

func hasArg(bootArgs, name string) bool {
	for arg := range strings.FieldsSeq(bootArgs) {
		if strings.HasPrefix(arg, name+"=") {
			return true
		}
	}
	return false
}

// hello is what the guest is told of itself.
func (m *Manager) hello(vm store.VM, plan smolvm.NetworkConfig) (*wire.Hello, error) {
	host, err := hostKey(vm)
	if err != nil {
		return nil, err
	}
	ours, err := m.clientSigner()
	if err != nil {
		return nil, err
	}
	authorized := [][]byte{ours.PublicKey().Marshal()}
	for _, line := range vm.Config.AuthorizedKeys {
		key, err := parseAuthorizedKey(line)
		if err != nil {
			return nil, fmt.Errorf("authorized key %q: %w", line, err)
		}
		authorized = append(authorized, key.Marshal())
	}
	return &wire.Hello{
		Hostname:       vm.Config.Hostname,
		MachineID:      vm.MachineID,
		HostKey:        host,
		AuthorizedKeys: authorized,
		Env:            vm.Config.Env,
		Network:        wireNetwork(plan),
	}, nil
}

func wireNetwork(plan smolvm.NetworkConfig) *wire.Network {
	return &wire.Network{
		MAC:     plan.GuestMAC,
		Address: netip.PrefixFrom(plan.GuestIP, plan.Prefix.Bits()),
		Gateway: plan.Gateway,
		DNS:     []netip.Addr{plan.Gateway},
	}
}

// warmUpOf is what a VM runs in a cold boot: only in the first that succeeds, as in a clone.
func (m *Manager) warmUpOf(vm store.VM) string {
	if vm.State != smolvm.StateCreated && vm.Run != "" {
		return ""
	}
	return vm.Config.WarmUp
}

// shimCommand is the program that becomes the shim.
func (m *Manager) shimCommand() ([]string, error) {
	switch {
	case m.config.Embedded:
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find this program, which is the VMs' shim too: %w", err)
		}
		return []string{self, shim.Argument}, nil
	case len(m.config.ShimCommand) > 0:
		return m.config.ShimCommand, nil
	}
	path, err := findProgram("smolvm")
	if err != nil {
		return nil, fmt.Errorf("%w; install the smolvm CLI, name it with the ShimCommand option, or make this program its own shim with the Embedded option", err)
	}
	return []string{path, "shim"}, nil
}

// readBootID names the host's present boot; empty if that can't be found out.
func readBootID() string {
	id, err := proc.BootID()
	if err != nil {
		return "" // then only a start time tells a reused pid from ours
	}
	return id
}
