package kvmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/testenv"
)

const (
	// machineMiB is the memory of the outer machine. Guests in it have some 100 to 500 MiB.
	machineMiB = 3072
	// machineCPUs is one: of two emulated CPUs that run guests, QEMU (7.2 at least) now and then
	// saves the host's registers as a guest's. The guest crashes then, or the host's kernel.
	machineCPUs = 1
	// bootTimeout bounds the start of an outer machine.
	bootTimeout = 5 * time.Minute
	// The outer machine is asked at intervals whether it is alive: by a program that it starts,
	// which takes a second, and more while all its CPUs are busy.
	watchEvery, watchLimit = 10 * time.Second, time.Minute
	// consoleLines is how much is read of the console of an outer machine in which a job failed.
	consoleLines = 120
)

// machine is one outer machine.
type machine struct {
	*Bed
	id string
}

// steadyTimer are the kernel arguments with which a CPU's timer ticks by itself, and is not set for
// each time anew. QEMU's emulation loses an interrupt now and then while a guest of the outer
// machine runs; without them, its CPU waits for that one for ever.
const steadyTimer = "nohz=off highres=off"

// setUp is what a host that runs VMs has, and a guest of smolvm's has not. Whichever module is
// of the processor's kind is loaded.
const setUp = `set -e
mkdir -p ` + mountPoint + `
mount -t ext4 /dev/vdb ` + mountPoint + `
chmod -R a+rX ` + mountPoint + `
chown -R ` + userName + `: /home/` + userName + ` ` + mountPoint + `/` + cacheDir + `
echo '+cpu +memory +pids' >/sys/fs/cgroup/cgroup.subtree_control
for module in kvm_amd kvm_intel tun vhost_vsock bridge veth nf_tables; do modprobe $module 2>/dev/null || true; done
chgrp ` + kvmGroup + ` /dev/kvm /dev/vhost-vsock
chmod 660 /dev/kvm /dev/vhost-vsock
chmod 666 /dev/net/tun
if [ -e /proc/sys/kernel/unprivileged_userns_clone ]; then echo 1 >/proc/sys/kernel/unprivileged_userns_clone; fi
echo always >/sys/kernel/mm/transparent_hugepage/enabled
ip link set lo up
`

// boot starts an outer machine, and makes it a host that runs VMs.
func (m machine) boot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	drive := m.ownDrive()
	if err := disk.Copy(ctx, disk.CopyOptions{Path: drive, Base: m.drive}); err != nil {
		return err
	}
	made, err := m.vms.Image(ctx, imageName)
	if err != nil {
		return err
	}
	_, err = m.vms.Create(ctx, smolvm.VMConfig{
		ID: m.id, VCPUs: machineCPUs, MemoryMiB: machineMiB, Image: imageName, Ephemeral: true, NestedVirtualization: true,
		BootArgs: made.BootArgs + " " + steadyTimer,
		Drives:   []smolvm.Drive{{Path: drive, Format: smolvm.FormatRaw}},
	}, smolvm.CreateOptions{})
	if err == nil {
		_, err = m.vms.Start(ctx, m.id, smolvm.StartOptions{Timeout: bootTimeout, Cold: true})
	}
	if err != nil {
		return fmt.Errorf("the outer machine does not boot: %w", err)
	}
	var said bytes.Buffer
	status, err := m.vms.Exec(ctx, m.id, smolvm.Command{Args: []string{"sh", "-c", setUp}, Stdout: &said, Stderr: &said})
	if err != nil || !status.Success() {
		return fmt.Errorf("set the outer machine up: %s, %w: %s", status, err, said.String())
	}
	return m.awaitKVM(ctx)
}

// probes is how often KVM is probed in an outer machine at most until it works.
const probes = 5

// awaitKVM probes KVM in the outer machine until it works. The first guest runs code that the
// emulated CPU has not run before, and may be too slow for the limits of the probe.
func (m machine) awaitKVM(ctx context.Context) error {
	doctor := smolvm.Command{Args: []string{filepath.Join(mountPoint, binDir, "smolvm"), "doctor", "--json"}, Env: []string{"SMOLVM_DATA_DIR=/tmp/doctor", "SMOLVM_BACKEND=qemu"}}
	problem := "it says nothing of KVM"
	for range probes {
		var said, errs bytes.Buffer
		doctor.Stdout, doctor.Stderr = &said, &errs
		// Its status tells of more than KVM.
		if _, err := m.vms.Exec(ctx, m.id, doctor); err != nil {
			return fmt.Errorf("probe KVM in the outer machine: %w", err)
		}
		var findings []smolvm.Finding
		if err := json.Unmarshal(said.Bytes(), &findings); err != nil {
			return fmt.Errorf("probe KVM in the outer machine: %w: %s", err, errs.String())
		}
		for _, finding := range findings {
			if finding.Name == "kvm" && strings.HasPrefix(finding.Problem, "usable") {
				return nil
			} else if finding.Name == "kvm" {
				problem = finding.Problem
			}
		}
	}
	return fmt.Errorf("KVM does not work in the outer machine, which was asked %d times: %s", probes, problem)
}

// ownDrive is the path of the machine's copy of the drive.
func (m machine) ownDrive() string { return filepath.Join(m.home, m.id+".drive") }

// end ends the outer machine, and removes what it had.
func (m machine) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := m.vms.Delete(ctx, m.id, smolvm.DeleteOptions{}); err != nil && !errors.Is(err, smolvm.ErrVMNotFound) {
		return fmt.Errorf("delete the outer machine: %w", err)
	}
	return os.RemoveAll(m.ownDrive())
}

// console returns the end of what the outer machine's kernel has said.
func (m machine) console(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	log, err := m.vms.Logs(ctx, m.id, smolvm.LogOptions{Tail: consoleLines})
	if err != nil {
		return "", fmt.Errorf("read the console of the outer machine: %w", err)
	}
	defer func() { _ = log.Close() }()
	text, err := io.ReadAll(log)
	if err != nil {
		return "", fmt.Errorf("read the console of the outer machine: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// exec runs a job in the outer machine that runs. Broken is set if there is no answer any more.
func (m machine) exec(ctx context.Context, job Job, out io.Writer) (failed, broken error) {
	command := smolvm.Command{
		Args:   append([]string{filepath.Join(mountPoint, testBinary(job.Package))}, job.arguments()...),
		Dir:    filepath.Join(mountPoint, sourceDir, job.Package),
		Env:    testenv.BedEnvironment(filepath.Join(mountPoint, cacheDir)),
		Stdout: out, Stderr: out,
	}
	if job.AsUser {
		command.User = userName
	}
	ctx, stop := watched(ctx, watchEvery, watchLimit, func(ctx context.Context) error {
		_, err := m.vms.Exec(ctx, m.id, smolvm.Command{Args: []string{"true"}})
		return err
	})
	defer stop()
	status, err := m.vms.Exec(ctx, m.id, command)
	switch {
	case err != nil:
		return nil, errors.Join(err, context.Cause(ctx))
	case !status.Success():
		return errors.New(status.String()), nil
	}
	return nil, nil
}

// cpuTime returns the CPU time that the outer machine has used, for people: on a busy host it tells
// more than the time that passed.
func (m machine) cpuTime(ctx context.Context) string {
	vm, err := m.vms.Get(ctx, m.id)
	if err != nil {
		return "unknown"
	}
	used, err := proc.CPUTime(vm.PID)
	if err != nil {
		return "unknown"
	}
	return fmt.Sprintf("%.1f s", used.Seconds())
}

// breakage matches what a kernel says when something has gone wrong that no program can cause.
var breakage = regexp.MustCompile(`Kernel panic|BUG: |Oops: |Internal error|general protection fault|double fault|` +
	`rcu: INFO: .* stall|soft lockup|Bad page|segfault at|traps: `)

// signOfBreakage returns the first such line of a console; empty: there is none.
func signOfBreakage(console string) string {
	for line := range strings.Lines(console) {
		if breakage.MatchString(line) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}
