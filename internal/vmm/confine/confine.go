// Package confine bounds what the process of a VMM takes of its host: by a control group where
// one can be made, and by rlimits everywhere.
package confine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/vmm"
)

const (
	// tableShare of the guest's memory is what the kernel's tables of it may take.
	tableShare = 64
	// reservedMiB is the address space that a VMM reserves for itself and hardly uses: stacks
	// of its threads, and of what waits for the disk. It is part of what a limit by rlimit
	// must allow, which counts what is reserved.
	reservedMiB = 4096
	// oomScore is added to how much the kernel wants to kill a VMM when the host has no
	// memory left: rather a guest than what manages it.
	oomScore = 300
	// maxFiles is how many files a VMM may have open; QEMU needs some 50, and one for each
	// drive.
	maxFiles = 1024
)

// hint is the way out for who asked for a limit that can't be.
const hint = "`smolvm doctor` says more"

// Bounds are what a VMM may take.
type Bounds struct {
	// ID is that of the VM. People find the group by it.
	ID string
	// GuestMiB is the guest's memory, and OverheadMiB what the VMM may take beside it.
	GuestMiB, OverheadMiB int
	// Tasks is how many threads the VMM may have.
	Tasks int
	// CPUs is how many processors' time the VMM may take. Zero: as much as there is.
	CPUs float64
}

// memoryMiB is the ceiling for the VMM's memory, the guest's included.
func (b Bounds) memoryMiB() int { return b.GuestMiB + b.GuestMiB/tableShare + b.OverheadMiB }

// Limits are what bounds one VMM. Their methods may be called from any goroutine.
type Limits struct {
	bounds Bounds

	mu     sync.Mutex    // guards the following
	group  *cgroup.Group // nil: none
	report smolvm.Limits
}

// New makes the control group of a VMM, if that can be. A limit of processor time must be: the
// error matches [smolvm.ErrUnsupported] then. Limits are to be removed in any case.
func New(site cgroup.Site, bounds Bounds) (*Limits, error) {
	memory := bounds.memoryMiB()
	group, err := site.Create(groupName(bounds.ID), cgroup.Limits{
		MemoryBytes: int64(memory) << 20, CPUs: bounds.CPUs, Tasks: bounds.Tasks,
	})
	if err != nil {
		if bounds.CPUs > 0 {
			return nil, noCPULimit(bounds.CPUs, err)
		}
		return &Limits{bounds: bounds, report: bounds.withoutGroup(err)}, nil
	}
	l := &Limits{bounds: bounds, group: group, report: smolvm.Limits{By: site.Version(), Group: group.Path(), CPUs: bounds.CPUs}}
	if group.Has(cgroup.Memory) {
		l.report.MemoryMiB = memory
	}
	if group.Has(cgroup.PIDs) {
		l.report.Tasks = bounds.Tasks
	}
	return l, nil
}

func noCPULimit(cpus float64, why error) error {
	return &smolvm.Error{Hint: hint, Err: fmt.Errorf("limit the VM to %g CPUs: %w: %w", cpus, smolvm.ErrUnsupported, why)}
}

// withoutGroup returns what is in force without a control group.
func (b Bounds) withoutGroup(why error) smolvm.Limits {
	return smolvm.Limits{By: "rlimit", MemoryMiB: b.GuestMiB + reservedMiB, Reason: why.Error()}
}

// groupName is different for each run. The id is there for people to read.
func groupName(id string) string {
	var b [4]byte
	if _, err := unix.Getrandom(b[:], 0); err != nil {
		return fmt.Sprintf("%s-%d", id, os.Getpid())
	}
	return fmt.Sprintf("%s-%x", strings.ReplaceAll(filepath.Base(id), " ", "-"), b)
}

// Process is that of a VMM.
type Process interface{ PID() int }

// Start starts a VMM within limits, by a function that is, or does more than, [proc.StartIn].
// Those by group hold from its first instruction on. If only limits could not be set, the
// process that runs is returned beside the error.
func Start[P Process](l *Limits, cmd *exec.Cmd, start func(cmd *exec.Cmd, within func(fork func() error) error) (P, error)) (P, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	plain := again(cmd)
	process, err := startIn(cmd, l.group, start)
	if err != nil && l.group != nil && l.bounds.CPUs == 0 {
		// Some hosts let groups be made, but nothing be started in them.
		why := err
		if process, err = startIn(plain, nil, start); err == nil {
			_ = l.group.Remove()
			l.group, l.report = nil, l.bounds.withoutGroup(why)
		}
	}
	if err != nil {
		var none P
		return none, err
	}
	return process, l.bound(process.PID())
}

// again copies a command: one that could not be started can't be used again.
func again(cmd *exec.Cmd) *exec.Cmd {
	c := exec.Command(cmd.Path) //nolint:noctx // as cmd
	c.Args, c.Dir, c.Env = cmd.Args, cmd.Dir, cmd.Env
	c.Stdin, c.Stdout, c.Stderr, c.ExtraFiles = cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles
	if cmd.SysProcAttr != nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
		*c.SysProcAttr = *cmd.SysProcAttr
	}
	return c
}

func startIn[P Process](cmd *exec.Cmd, group *cgroup.Group, start func(cmd *exec.Cmd, within func(fork func() error) error) (P, error)) (P, error) {
	if group == nil {
		return start(cmd, func(fork func() error) error { return fork() })
	}
	within, closeFD, err := group.Within(cmd)
	if err != nil {
		var none P
		return none, err
	}
	defer closeFD()
	return start(cmd, within)
}

// bound sets the limits that belong to a process. They are set when it has just been
// started, so no guest runs in it yet.
func (l *Limits) bound(pid int) error {
	for _, limit := range []struct {
		resource int
		most     uint64
	}{
		{unix.RLIMIT_DATA, uint64(l.bounds.GuestMiB+reservedMiB) << 20},
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
	return fmt.Errorf("limit the VMM: %w", err)
}

// Killed says, after the VMM's end, if it was its memory's limit that ended it; empty: it was
// not.
func (l *Limits) Killed() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.group == nil || !l.group.Killed() {
		return ""
	}
	return fmt.Sprintf("it took more memory than the %d MiB that it may (the guest's, and what the VMM needs)", l.report.MemoryMiB)
}

// Remove removes the group; the VMM has ended.
func (l *Limits) Remove() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.group != nil {
		_ = l.group.Remove() // what is left is swept up by others
	}
}

// Report returns what is bounded, and by what.
func (l *Limits) Report() smolvm.Limits {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.report
}

// SetCPUs changes how many processors' time the VMM, a process that was started within the
// limits, may take. The error matches [smolvm.ErrUnsupported] if this host can't enforce it.
func (l *Limits) SetCPUs(cpus float64, pid int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := cgroup.ErrUnavailable
	if l.group != nil {
		err = l.group.SetCPUs(cpus, pid)
	}
	if err != nil {
		return noCPULimit(cpus, err)
	}
	l.report.CPUs = cpus
	return nil
}

// SetDisk notes the limit of the drives' speed, which the VMM itself enforces.
func (l *Limits) SetDisk(limit vmm.DiskLimit) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.report.DiskBytesPerSecond, l.report.DiskIOPS = limit.BytesPerSecond, limit.IOPS
}
