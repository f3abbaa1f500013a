package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/qemu"
)

// greedy takes all the CPUs for a while, and then all the memory.
const greedy = `
while :; do :; done &
first=$!
while :; do :; done &
sleep 6
kill $first $!
mkdir -p /mnt
mount -t tmpfs -o size=90% t /mnt
dd if=/dev/zero of=/mnt/x bs=1M
sleep 1000
`

// A guest gets the processor time that it may have, and a VMM that takes more memory than it
// may is ended, with that as the cause; no group is left (L1).
func TestLimits(t *testing.T) {
	testenv.RequireQEMU(t)
	site := cgroup.Find("/")
	for _, controller := range []string{cgroup.Memory, cgroup.CPU, cgroup.PIDs} {
		if why := site.Why(controller); why != nil {
			t.Skipf("%s can't be bounded here: %v", controller, why)
		}
	}
	const share = 0.5
	dir := t.TempDir()
	cfg := vmm.Config{
		ID: "limits", Accelerator: vmm.TCG, VCPUs: 2, MemoryMiB: 512, CPULimit: share,
		Kernel: testenv.Kernel(t), Initrd: testenv.Initramfs(t, greedy),
		BootArgs:    "console=ttyS0 panic=1 quiet",
		ConsolePath: filepath.Join(dir, "console"), LogPath: filepath.Join(dir, "log"),
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	instance, err := qemu.New(qemu.Options{}).Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = instance.Kill(context.Background()) }()
	limits := instance.(vmm.Limiter).Limits() //nolint:forcetypeassert // it is one
	if limits.CPUs != share || limits.MemoryMiB <= cfg.MemoryMiB || limits.Tasks == 0 || limits.Reason != "" {
		t.Errorf("limits are %+v", limits)
	}
	// It is to take more than it may, so it may take less.
	const ceiling = 300 << 20
	file := filepath.Join(limits.Group, "memory.max")
	if _, err := os.Stat(file); err != nil {
		file = filepath.Join(limits.Group, "memory.limit_in_bytes")
	}
	if err := os.WriteFile(file, fmt.Append(nil, ceiling), 0); err != nil {
		t.Fatal(err)
	}
	began, before := time.Now(), cpuTime(t, instance.PID())
	const span = 4 * time.Second
	select {
	case <-time.After(span):
	case <-instance.Done():
		t.Fatal("the VM has ended: ", instance.Exit())
	}
	used, took := cpuTime(t, instance.PID())-before, time.Since(began)
	if most := time.Duration(share*float64(took)) + 200*time.Millisecond; used > most {
		t.Errorf("in %s the VMM had %s of a processor, want at most %s", took, used, most)
	}
	if err := instance.(vmm.Limiter).SetCPULimit(ctx, 4); err != nil { //nolint:forcetypeassert // as above
		t.Error(err)
	}
	select {
	case <-instance.Done():
	case <-ctx.Done():
		t.Fatal("the VM goes on")
	}
	if exit := instance.Exit(); exit.Reason != vmm.ExitCrashed || !strings.Contains(exit.Detail, "more memory") {
		t.Errorf("Exit = %+v", exit)
	}
	if _, err := os.Stat(limits.Group); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left", limits.Group)
	}
}

// cpuTime is what a process has used: the 14th and 15th field of proc_pid_stat(5).
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(after)
	const ticks = 100 // a second, on every architecture of Linux (USER_HZ)
	user, userErr := strconv.Atoi(fields[11])
	system, systemErr := strconv.Atoi(fields[12])
	if err := errors.Join(userErr, systemErr); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * time.Second / ticks
}
