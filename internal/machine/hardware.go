package machine

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/vmm"
)

// Hardware is what a saved guest needs to find again to go on.
type Hardware struct {
	Backend     string `json:"backend"`
	Accelerator string `json:"accelerator"`
	// Program is the VMM's, with what changes when it is upgraded.
	Program string `json:"program"`
	// Layout of the devices; see [vmm.Traits].
	Layout    int    `json:"layout"`
	CPU       string `json:"cpu"`
	VCPUs     int    `json:"vcpus"`
	MemoryMiB int    `json:"memory_mib"`
	// Nested reports whether the CPU has virtualization.
	Nested bool        `json:"nested,omitempty"`
	Drives []DriveKind `json:"drives"`
	// NIC is what the network interface leads to, as that offers the guest other features.
	NIC NICKind `json:"nic,omitempty"`
}

// NICKind is what a network interface leads to.
type NICKind string

// The kinds of network interfaces. The empty one is a socket, of the mode user.
const (
	NICTAP  NICKind = "tap"
	NICNone NICKind = "none"
)

// Mode returns the first network mode of guests with such an interface.
func (k NICKind) Mode() smolvm.NetworkMode {
	return cmp.Or(smolvm.NetworkMode(k), smolvm.NetworkUser)
}

// NICOf returns the interface of a VM with addresses; nil: it has none.
func NICOf(at network.Addresses) *vmm.NIC {
	if at.Mode == smolvm.NetworkNone {
		return nil
	}
	return &vmm.NIC{MAC: at.MAC, TAP: at.TAP}
}

func kindOfNIC(nic *vmm.NIC) NICKind {
	switch {
	case nic == nil:
		return NICNone
	case nic.TAP != "":
		return NICTAP
	}
	return ""
}

// DriveKind is what the hardware of a drive is.
type DriveKind struct {
	Format   string `json:"format"`
	ReadOnly bool   `json:"read_only"`
}

// HardwareOf returns the hardware of a VM that a backend runs as config says.
func (b *Builder) HardwareOf(backend string, config vmm.Config) (Hardware, error) {
	declared, err := b.Backends.Lookup(backend)
	if err != nil {
		return Hardware{}, err
	}
	program, err := programStamp(declared)
	if err != nil {
		return Hardware{}, err
	}
	h := Hardware{
		Backend:     backend,
		Accelerator: config.Accelerator,
		Program:     program,
		Layout:      declared.Layout,
		CPU:         b.Host.CPUModel(),
		VCPUs:       config.VCPUs,
		MemoryMiB:   config.MemoryMiB,
		Nested:      config.Nested,
		NIC:         kindOfNIC(config.NIC),
	}
	for _, drive := range config.Drives {
		h.Drives = append(h.Drives, DriveKind{drive.Format, drive.ReadOnly})
	}
	return h, nil
}

// programStamp tells one build of a VMM from another without running it.
func programStamp(backend vmm.Traits) (string, error) {
	for _, name := range backend.Programs[0].Names {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return "", err
		}
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%s %d %d", path, info.Size(), info.ModTime().UnixNano()), nil
	}
	return "", fmt.Errorf("%s is not installed", strings.Join(backend.Programs[0].Names, " or "))
}

// Difference tells in what some hardware differs from what there is now; empty: in nothing.
func (h Hardware) Difference(now Hardware) string {
	for _, part := range []struct {
		name    string
		was, is any
	}{
		{"backend", h.Backend, now.Backend},
		{"accelerator", h.Accelerator, now.Accelerator},
		{"program of the VMM", h.Program, now.Program},
		{"layout of the devices", h.Layout, now.Layout},
		{"CPU", h.CPU, now.CPU},
		{"number of CPUs", h.VCPUs, now.VCPUs},
		{"memory in MiB", h.MemoryMiB, now.MemoryMiB},
		{"virtualization for VMs of its own", h.Nested, now.Nested},
		{"network interface", h.NIC.Mode(), now.NIC.Mode()},
		{"disks", fmt.Sprintf("%+v", h.Drives), fmt.Sprintf("%+v", now.Drives)},
	} {
		if part.was != part.is {
			return fmt.Sprintf("its %s was %v, and is %v now", part.name, part.was, part.is)
		}
	}
	return ""
}
