package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/vmm"
)

// What QEMU may take beside the guest's memory. Measured (QEMU 7.2, emulated, two CPUs): 60
// MB when the guest is up, 130 MB after a build in it, and what translationMiB allows when a
// guest runs new code without end. The rest is the page cache of its disks, and room.
const (
	overheadMiB = 256
	// translationMiB is how much translated code is kept of an emulated guest. QEMU's own
	// choice is an eighth of the host's memory, up to 1 GiB, for each VM.
	translationMiB = 256
	// tableShare of the guest's memory is what the kernel's tables of it may take.
	tableShare = 64
	// spareTasks are threads beside those of the guest's CPUs: up to 64 that wait for the
	// disk, and a few of QEMU's own.
	spareTasks = 128
	// reservedMiB is the address space that QEMU reserves for itself and hardly uses: stacks
	// of its threads, and of what waits for the disk. It is part of what a limit by rlimit
	// must allow, which counts what is reserved.
	reservedMiB = 4096
	// oomScore is added to how much the kernel wants to kill QEMU when the host has no
	// memory left: rather a guest than what manages it.
	oomScore = 300
	// maxFiles is how many files QEMU may have open; it needs some 50, and one for each drive.
	maxFiles = 1024
)

// limits are what bounds a VMM.
type limits struct {
	group  *cgroup.Group // nil: none
	report smolvm.Limits
}

// memoryMiB is the ceiling for QEMU's memory, the guest's included.
func memoryMiB(cfg vmm.Config) int {
	total := cfg.MemoryMiB + cfg.MemoryMiB/tableShare + overheadMiB
	if cfg.Accelerator == vmm.TCG {
		total += translationMiB
	}
	return total
}

// newLimits makes the control group of a VMM, if that can be. A limit that was asked for
// must be.
func newLimits(site cgroup.Site, cfg vmm.Config) (limits, error) {
	memory, tasks := memoryMiB(cfg), cfg.VCPUs+spareTasks
	group, err := site.Create(groupName(cfg.ID), cgroup.Limits{
		MemoryBytes: int64(memory) << 20, CPUs: cfg.CPULimit, Tasks: tasks,
	})
	if err != nil {
		if cfg.CPULimit > 0 {
			return limits{}, &smolvm.Error{Hint: "`smolvm doctor` says more", Err: fmt.Errorf("limit the VM to %g CPUs: %w: %w", cfg.CPULimit, smolvm.ErrUnsupported, err)}
		}
		return withoutGroup(cfg, err), nil
	}
	l := limits{group: group, report: smolvm.Limits{By: site.Version(), Group: group.Path(), CPUs: cfg.CPULimit}}
	if group.Has(cgroup.Memory) {
		l.report.MemoryMiB = memory
	}
	if group.Has(cgroup.PIDs) {
		l.report.Tasks = tasks
	}
	return l, nil
}

// withoutGroup are limits without a control group.
func withoutGroup(cfg vmm.Config, why error) limits {
	return limits{report: smolvm.Limits{By: "rlimit", MemoryMiB: cfg.MemoryMiB + reservedMiB, Reason: why.Error()}}
}

// groupName is different for each run. The id is there for people to read.
func groupName(id string) string {
	var b [4]byte
	if _, err := unix.Getrandom(b[:], 0); err != nil {
		return fmt.Sprintf("%s-%d", id, os.Getpid())
	}
	return fmt.Sprintf("%s-%x", strings.ReplaceAll(filepath.Base(id), " ", "-"), b)
}

// start starts QEMU within its limits. Those by group hold from its first instruction on.
func (l *limits) start(cmd *exec.Cmd, cfg vmm.Config) (*proc.Child, error) {
	// A command that could not be started can't be used again.
	plain := exec.Command(cmd.Path, cmd.Args[1:]...) //nolint:noctx // as cmd
	plain.Stdout, plain.Stderr, plain.Env, plain.ExtraFiles = cmd.Stdout, cmd.Stderr, cmd.Env, cmd.ExtraFiles
	child, err := l.startIn(cmd)
	if err != nil && l.group != nil && cfg.CPULimit == 0 {
		// Some hosts let groups be made, but nothing be started in them.
		without := withoutGroup(cfg, err)
		if child, err = without.startIn(plain); err == nil {
			l.remove()
			*l = without
		}
	}
	if err != nil {
		return nil, err
	}
	return child, l.bound(child.PID(), cfg)
}

func (l *limits) startIn(cmd *exec.Cmd) (*proc.Child, error) {
	if l.group == nil {
		return proc.Start(cmd)
	}
	within, closeFD, err := l.group.Within(cmd)
	if err != nil {
		return nil, err
	}
	defer closeFD()
	return proc.StartIn(cmd, within)
}

// bound sets the limits that belong to a process. They are set when it has just been
// started, so no guest runs in it yet.
func (l *limits) bound(pid int, cfg vmm.Config) error {
	for _, limit := range []struct {
		resource int
		most     uint64
	}{
		{unix.RLIMIT_DATA, uint64(cfg.MemoryMiB+reservedMiB) << 20},
		{unix.RLIMIT_CORE, 0}, // it would hold the guest's memory
		{unix.RLIMIT_NOFILE, maxFiles},
	} {
		// What this process may not exceed by far, it may not either.
		var now unix.Rlimit
		if err := unix.Prlimit(pid, limit.resource, nil, &now); err != nil {
			return ignoreGone(err)
		}
		most := min(limit.most, now.Max)
		if err := unix.Prlimit(pid, limit.resource, &unix.Rlimit{Cur: most, Max: most}, nil); err != nil {
			return ignoreGone(err)
		}
	}
	// A container may forbid even this; it is only for the worst case.
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(oomScore)), 0)
	return nil
}

// ignoreGone makes a success of limits for a process that has ended: why is for others to
// find out.
func ignoreGone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return fmt.Errorf("limit QEMU: %w", err)
}

// killed says, after QEMU's end, if it was its memory's limit that ended it.
func (l *limits) killed() string {
	if l.group == nil || !l.group.Killed() {
		return ""
	}
	return fmt.Sprintf("it took more memory than the %d MiB that it may (the guest's, and what QEMU needs)", l.report.MemoryMiB)
}

// remove removes the group; QEMU has ended.
func (l *limits) remove() {
	if l.group != nil {
		_ = l.group.Remove() // what is left is swept up by others
	}
}

// Limits implements [vmm.Limiter].
func (i *instance) Limits() smolvm.Limits {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.limits.report
}

// SetCPULimit implements [vmm.Limiter].
func (i *instance) SetCPULimit(_ context.Context, cpus float64) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	err := cgroup.ErrUnavailable
	if i.limits.group != nil {
		err = i.limits.group.SetCPUs(cpus, i.child.PID())
	}
	if err != nil {
		return &smolvm.Error{Hint: "`smolvm doctor` says more", Err: fmt.Errorf("limit the VM to %g CPUs: %w: %w", cpus, smolvm.ErrUnsupported, err)}
	}
	i.limits.report.CPUs = cpus
	return nil
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
	i.mu.Lock()
	defer i.mu.Unlock()
	i.limits.report.DiskBytesPerSecond, i.limits.report.DiskIOPS = limit.BytesPerSecond, limit.IOPS
	return nil
}
