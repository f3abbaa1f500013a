// Package machine turns a VM's row into what a VMM runs: its kernel, its devices and its disks.
package machine

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/host"
	"github.com/smolvm/smolvm/internal/image"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// Builder makes the machines of the VMs of a data directory.
type Builder struct {
	Dir    *datadir.Dir
	Images *image.Store
	Disks  *backing.Disks
	Store  *store.Store
	Host   *host.Host
	// Backends are those that are known.
	Backends traits.List
}

// Addresses returns what follows from a VM's lease, in the mode in which it is connected.
func Addresses(vm store.VM) (network.Addresses, error) {
	pool := vm.Pool
	if !pool.IsValid() { // it has no part in modes without addresses of a pool
		pool = network.DefaultPool()
	}
	return network.PlanIn(pool, vm.Config.Network.Mode, vm.Lease)
}

// Network returns what the shim of a VM is told of its network, but for the egress policy; nil:
// the VM has none.
func Network(vm store.VM, at network.Addresses) *network.Config {
	if at.Mode == smolvm.NetworkNone {
		return nil
	}
	asked, config := vm.Config.Network, at.Config()
	config.Bridge, config.OpenToVMs = asked.Bridge, asked.OpenToVMs
	config.Rate = network.Rate{ToGuest: uint64(asked.ReceiveBitsPerSecond), FromGuest: uint64(asked.SendBitsPerSecond)}
	return &config
}

// MTU returns the MTU of guests' interfaces in a network mode, in bytes; zero: 1500.
func (b *Builder) MTU(backend string, mode smolvm.NetworkMode) int {
	declared, err := b.Backends.Lookup(backend)
	if err != nil || mode != smolvm.NetworkUser {
		return 0
	}
	return min(declared.MaxMTU, network.UserMTU)
}

// Config returns what the VMM of a VM is to run on an accelerator. Its network interface has no
// link yet. It is an error if the VM has a disk that its backend can't use.
func (b *Builder) Config(ctx context.Context, vm store.VM, accelerator string) (vmm.Config, error) {
	config := vmm.Config{
		ID:          vm.ID,
		Accelerator: accelerator,
		VCPUs:       vm.Config.VCPUs,
		MemoryMiB:   vm.Config.MemoryMiB,
		Nested:      vm.Config.NestedVirtualization,
		CPULimit:    vm.Config.CPULimit,
		DiskLimit:   vmm.DiskLimit{BytesPerSecond: vm.Config.DiskBytesPerSecond, IOPS: vm.Config.DiskIOPS},
		Kernel:      vm.Config.KernelPath,
		Initrd:      vm.Config.InitrdPath,
		BootArgs:    vm.Config.BootArgs,
		Channel:     vm.Config.UsesImage(),
		ConsolePath: vm.LogPath,
		LogPath:     filepath.Join(b.Dir.VM(vm.ID), VMMLog),
		WorkDir:     b.Dir.VM(vm.ID),
	}
	at, err := Addresses(vm)
	if err == nil {
		config.NIC = NICOf(at)
		err = b.checkNested(vm, accelerator)
	}
	if err != nil {
		return config, err
	}
	if vm.Config.UsesImage() {
		image, err := b.Images.Get(ctx, vm.Image)
		if err != nil {
			return config, err
		}
		config.Kernel, config.Initrd = image.KernelPath, image.InitrdPath
		if config.BootArgs == "" {
			config.BootArgs = image.BootArgs
		}
	} else if config.Kernel, err = b.Images.Kernel(ctx, config.Kernel); err != nil {
		return config, err
	}
	if vm.DiskPath != "" && !hasArg(config.BootArgs, "root") {
		config.BootArgs += " root=/dev/vda rw"
	}
	if config.Drives, err = b.Drives(vm); err == nil {
		err = b.checkFormats(vm.Backend, config.Drives)
	}
	return config, err
}

// checkFormats returns an error if there is a disk that a backend can't use.
func (b *Builder) checkFormats(backend string, drives []vmm.Drive) error {
	declared, err := b.Backends.Lookup(backend)
	if err != nil {
		return err
	}
	for _, drive := range drives {
		if format := (traits.Needs{DiskFormats: []string{drive.Format}}).Unmet(declared); format != "" {
			return UnusableFormat(declared, drive.Path, format)
		}
	}
	return nil
}

// UnusableFormat returns the error of a disk that a backend can't use.
func UnusableFormat(backend vmm.Traits, path, format string) error {
	return &smolvm.Error{
		Hint: fmt.Sprintf("choose a backend that can use it, or copy it with `qemu-img convert -f %s -O %s`", format, backend.DiskFormats[0]),
		Err: fmt.Errorf("%w: %s is %s, and backend %s can use %s only", smolvm.ErrUnsupported,
			path, format, backend.Name, strings.Join(backend.DiskFormats, " and ")),
	}
}

// checkNested returns why a VM that is to run VMs itself can't do so here.
func (b *Builder) checkNested(vm store.VM, accelerator string) error {
	if !vm.Config.NestedVirtualization {
		return nil
	}
	backend, err := b.Backends.Lookup(vm.Backend)
	if err != nil {
		return err
	}
	if !backend.Nested {
		return fmt.Errorf("nested virtualization: %w by backend %s on %s", smolvm.ErrUnsupported, backend.Name, runtime.GOARCH)
	}
	if reason, fix := b.Host.NestedProblem(accelerator); reason != "" {
		return &smolvm.Error{Hint: fix, Err: fmt.Errorf("nested virtualization: %w: %s", smolvm.ErrUnsupported, reason)}
	}
	return nil
}

// BootTimeout returns how long a VM may take to become ready on an accelerator, unless its
// user says otherwise: [smolvm.DefaultBootTimeout], times what the accelerator is slower.
func (b *Builder) BootTimeout(ctx context.Context, accelerator string) time.Duration {
	return time.Duration(b.Host.Slowness(ctx, accelerator) * float64(smolvm.DefaultBootTimeout)).Round(time.Second)
}

// VMMLog is the name of the file with a VMM's own output, beside the log of the console.
const VMMLog = "vmm.log"

func hasArg(bootArgs, name string) bool {
	for arg := range strings.FieldsSeq(bootArgs) {
		if strings.HasPrefix(arg, name+"=") {
			return true
		}
	}
	return false
}
