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
}

// Addresses returns what follows from a VM's lease, in the mode in which it is connected.
func Addresses(vm store.VM) (network.Addresses, error) {
	return network.Plan(smolvm.NetworkUser, vm.Lease)
}

// Config returns what the VMM of a VM is to run on an accelerator, but for the network.
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
	}
	err := b.checkNested(vm, accelerator)
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
	config.Drives, err = b.Drives(vm)
	return config, err
}

// checkNested returns why a VM that is to run VMs itself can't do so here.
func (b *Builder) checkNested(vm store.VM, accelerator string) error {
	if !vm.Config.NestedVirtualization {
		return nil
	}
	backend, err := traits.Lookup(vm.Backend)
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
