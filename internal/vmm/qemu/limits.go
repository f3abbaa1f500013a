package qemu

import (
	"context"
	"fmt"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/confine"
)

// What QEMU may take beside the guest's memory. Measured (QEMU 7.2, emulated, two CPUs): 60
// MB when the guest is up, 130 MB after a build in it, and what translationMiB allows when a
// guest runs new code without end. The rest is the page cache of its disks, and room.
const (
	overheadMiB = 256
	// translationMiB is how much translated code is kept of an emulated guest. QEMU's own
	// choice is an eighth of the host's memory, up to 1 GiB, for each VM.
	translationMiB = 256
	// spareTasks are threads beside those of the guest's CPUs: up to 64 that wait for the
	// disk, and a few of QEMU's own.
	spareTasks = 128
)

// bounds are what QEMU may take for a VM.
func bounds(cfg vmm.Config) confine.Bounds {
	b := confine.Bounds{ID: cfg.ID, GuestMiB: cfg.MemoryMiB, OverheadMiB: overheadMiB, Tasks: cfg.VCPUs + spareTasks, CPUs: cfg.CPULimit}
	if cfg.Accelerator == vmm.TCG {
		b.OverheadMiB += translationMiB
	}
	return b
}

// Limits implements [vmm.Limiter].
func (i *instance) Limits() smolvm.Limits { return i.limits.Report() }

// SetCPULimit implements [vmm.Limiter].
func (i *instance) SetCPULimit(_ context.Context, cpus float64) error {
	return i.limits.SetCPUs(cpus, i.child.PID())
}

// diskGroup is the name that all drives have their limit by, so that it is one of their sum.
const diskGroup = "drives"

// SetDiskLimit implements [vmm.DiskLimiter].
func (i *instance) SetDiskLimit(ctx context.Context, limit vmm.DiskLimit) error {
	for n := range i.cfg.Drives {
		// The device has the limit, not the node that is its disk: a saving puts another in
		// its place. It is set anew for each, which makes no difference.
		err := i.qmp.settle(ctx, request{Execute: "block_set_io_throttle", Arguments: map[string]any{
			"id": devicePath(i.machine, n), "group": diskGroup,
			"bps": limit.BytesPerSecond, "bps_rd": 0, "bps_wr": 0,
			"iops": limit.IOPS, "iops_rd": 0, "iops_wr": 0,
		}})
		if err != nil {
			return fmt.Errorf("limit the speed of drive %d: %w", n, err)
		}
	}
	i.limits.SetDisk(limit)
	return nil
}
