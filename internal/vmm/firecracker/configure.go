package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
)

// guestCID is the guest's address on vsock. It is the same for every VM: each has a vsock of
// its own.
const guestCID = 3

// interfaceID is Firecracker's name of the network interface.
const interfaceID = "net"

// boot tells Firecracker of the VM, and starts the guest.
func (i *instance) boot(ctx context.Context) error {
	cfg := i.cfg
	if err := checkKernel(cfg.Kernel, i.version); err != nil {
		return err
	}
	if err := i.api.SetMachine(ctx, api.MachineConfig{VCPUs: cfg.VCPUs, MemoryMiB: cfg.MemoryMiB}); err != nil {
		return err
	}
	source := api.BootSource{Kernel: nameKernel, BootArgs: bootArgs(cfg)}
	if cfg.Initrd != "" {
		source.Initrd = nameInitrd
	}
	if err := i.api.SetBootSource(ctx, source); err != nil {
		return err
	}
	for n := range cfg.Drives {
		if err := i.api.SetDrive(ctx, drive(cfg, n)); err != nil {
			return err
		}
	}
	if cfg.NIC != nil {
		if err := i.api.SetNetworkInterface(ctx, networkInterface(*cfg.NIC, i.version)); err != nil {
			return err
		}
	}
	if cfg.Channel {
		if err := i.api.SetVsock(ctx, api.Vsock{GuestCID: guestCID, Path: nameVsock}); err != nil {
			return err
		}
	}
	if err := i.api.SetEntropy(ctx, api.Entropy{}); err != nil {
		return err
	}
	i.limits.SetDisk(cfg.DiskLimit)
	return i.api.Do(ctx, api.InstanceStart)
}

// bootArgs is the kernel's command line: what was asked for, and what it takes to see the
// guest's console, to notice its end, and to find its channel.
func bootArgs(cfg vmm.Config) string {
	words := strings.Fields(cfg.BootArgs)
	has := func(name string) bool {
		for _, word := range words {
			if word == name || strings.HasPrefix(word, name+"=") {
				return true
			}
		}
		return false
	}
	// A reset by the keyboard's controller is what ends Firecracker; there is no PCI; and the
	// kernel need not look for a mouse, which takes it a while.
	for _, arg := range []struct{ name, value string }{
		{"console", "=ttyS0"}, {"reboot", "=k"}, {"panic", "=1"}, {"pci", "=off"},
		{"i8042.noaux", ""}, {"i8042.nomux", ""}, {"i8042.dumbkbd", ""},
	} {
		if !has(arg.name) {
			words = append(words, arg.name+arg.value)
		}
	}
	if cfg.Channel {
		words = append(words, fmt.Sprintf("%s=%d", vmm.ChannelVsockArg, vmm.ChannelVsockPort))
	}
	return strings.Join(words, " ")
}

func driveName(n int) string { return nameDrive + strconv.Itoa(n) }

// drive is the nth drive of a VM.
func drive(cfg vmm.Config, n int) api.Drive {
	d := api.Drive{
		ID: driveName(n), Path: driveName(n), ReadOnly: cfg.Drives[n].ReadOnly,
		// What a guest has flushed survives a power cut.
		CacheType: api.CacheWriteback,
	}
	if cfg.DiskLimit != (vmm.DiskLimit{}) {
		d.RateLimiter = limiter(cfg.DiskLimit, len(cfg.Drives))
	}
	return d
}

// limiter is what one of several drives gets of their limit: an equal share, as Firecracker
// has no limit of their sum.
func limiter(limit vmm.DiskLimit, drives int) *api.RateLimiter {
	return &api.RateLimiter{Bandwidth: bucket(limit.BytesPerSecond, drives), Ops: bucket(limit.IOPS, drives)}
}

// bucket returns the bucket for a rate per second. One of no size is no limit, also where
// there was one.
func bucket(perSecond int64, shares int) *api.TokenBucket {
	if perSecond == 0 {
		return &api.TokenBucket{}
	}
	// A tenth of a second's tokens at most come at once, but at least one.
	const second, tenth = 1000, 100
	share := max(1, perSecond/int64(shares))
	if share < second/tenth {
		return &api.TokenBucket{Size: share, RefillTime: second}
	}
	return &api.TokenBucket{Size: share / (second / tenth), RefillTime: tenth}
}

// networkInterface is the guest's, with an MTU if the release can offer one.
func networkInterface(nic vmm.NIC, version api.Version) api.NetworkInterface {
	n := api.NetworkInterface{ID: interfaceID, TAP: tapName(nic), MAC: nic.MAC}
	if api.MTU.In(version) {
		n.MTU = nic.MTU
	}
	return n
}

// tapName is the name of the TAP interface where Firecracker runs.
func tapName(nic vmm.NIC) string {
	if nic.Link != nil {
		return namespace.TAP
	}
	return nic.TAP
}

// checkKernel refuses what Firecracker would, but with a better reason.
func checkKernel(path string, version api.Version) error {
	if runtime.GOARCH != "amd64" || api.BzImage.In(version) {
		return nil
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	magic := make([]byte, len(elfMagic))
	if _, err := file.ReadAt(magic, 0); err != nil || string(magic) != elfMagic {
		return fmt.Errorf("kernel %s: Firecracker %s boots ELF files (vmlinux) only, which this is not", path, version)
	}
	return nil
}

const elfMagic = "\x7fELF"

// checkMemory refuses a saved memory of another size than the VM's.
func checkMemory(cfg vmm.Config) error {
	memory, err := os.Stat(cfg.Restore.Memory)
	if err != nil {
		return err
	}
	if want := int64(cfg.MemoryMiB) << 20; memory.Size() != want {
		return fmt.Errorf("the saved memory %s is of %d bytes, not of the VM's %d", cfg.Restore.Memory, memory.Size(), want)
	}
	return nil
}

// restore has Firecracker load the saved guest, which goes on.
func (i *instance) restore(ctx context.Context) error {
	load := api.LoadParams{State: nameState, Memory: api.MemoryBackend{Type: api.BackendFile, Path: nameMemory}}
	if nic := i.cfg.NIC; nic != nil && nic.Link == nil && api.NetworkOverrides.In(i.version) {
		load.Networks = []api.NetworkOverride{{ID: interfaceID, TAP: tapName(*nic)}}
	}
	// The limit of drives is saved with a guest, and this one may have another.
	load.Resume = i.cfg.DiskLimit == vmm.DiskLimit{}
	if err := i.api.LoadSnapshot(ctx, load); err != nil {
		return err
	}
	i.resetChannel()
	if len(i.cfg.Drives) > 0 {
		if err := i.SetDiskLimit(ctx, i.cfg.DiskLimit); err != nil {
			return err
		}
	}
	if load.Resume {
		return nil
	}
	return i.api.SetState(ctx, api.Resumed)
}

// SetDiskLimit implements [vmm.DiskLimiter].
func (i *instance) SetDiskLimit(ctx context.Context, limit vmm.DiskLimit) error {
	var errs []error
	for n := range i.cfg.Drives {
		err := i.api.UpdateDrive(ctx, api.DriveUpdate{ID: driveName(n), RateLimiter: limiter(limit, len(i.cfg.Drives))})
		if err != nil {
			errs = append(errs, fmt.Errorf("limit the speed of drive %d: %w", n, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	i.limits.SetDisk(limit)
	return nil
}
