package kvmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

const (
	// machineID is the id of the outer machine.
	machineID = "bed"
	// The size of the outer machine. Guests in it have some 100 to 500 MiB.
	machineCPUs, machineMiB = 2, 3072
	// prepareTimeout bounds all that is made before the outer machine starts, which may
	// download packages and build all tests; bootTimeout its start.
	prepareTimeout, bootTimeout = 15 * time.Minute, 5 * time.Minute
	// grace is how long after its timeout a test binary may take to tell where it hangs.
	grace = 30 * time.Second
	// The outer machine is asked at intervals whether it is alive: by a program that it starts,
	// which takes a second, and more while all its CPUs are busy.
	watchEvery, watchLimit = 10 * time.Second, time.Minute
	// consoleLines is how much of the console is shown of an outer machine that failed.
	consoleLines = 60
)

// Bed is an outer machine that runs.
type Bed struct {
	vms    *manager.Manager
	module string
}

// Open builds the tests of the jobs, and boots an outer machine that has them. It ends with
// the test. The calling program's main, or TestMain, must begin with shim.Main.
func Open(t *testing.T, jobs []Job) *Bed {
	t.Helper()
	testenv.RequireQEMU(t)
	ctx, cancel := context.WithTimeout(t.Context(), prepareTimeout)
	defer cancel()
	module := testenv.Module(t)
	b := &Bed{module: module}
	begun := time.Now()
	done := func(what string) {
		t.Logf("%s: %.1f s", what, time.Since(begun).Seconds())
		begun = time.Now()
	}
	dir := filepath.Join(testenv.Cache(t), "kvm")
	path := filepath.Join(t.TempDir(), "drive")
	b.prepare(ctx, t, dir, path, jobs, done)
	b.boot(ctx, t, dir, path)
	done("boot the outer machine")
	return b
}

// prepare makes the image of the outer machine in dir, and its drive.
func (b *Bed) prepare(ctx context.Context, t *testing.T, dir, path string, jobs []Job, done func(string)) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := flock.Lock(ctx, lock); err != nil {
		t.Fatal(err)
	}
	base, agent := testenv.Image(t), testenv.Agent(t)
	done("default image")
	last := ""
	progress := func(phase string) {
		if phase != last {
			t.Log(phase)
		}
		last = phase
	}
	if _, err := ensureImage(ctx, dir, filepath.Join(b.module, "bin/tools"), agent, progress); err != nil {
		t.Fatal(err)
	}
	done("image of the outer machine")
	stage, err := os.MkdirTemp(dir, "drive-*")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(stage) }()
	d := drive{module: b.module, stage: stage}
	if err := d.addAll(ctx, jobs, agent, base); err != nil {
		t.Fatal(err)
	}
	done("build the tests")
	if err := d.make(ctx, path); err != nil {
		t.Fatal(err)
	}
	done("make a drive of them")
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
ip link set lo up
`

// boot starts the outer machine, and makes it a host that runs VMs.
func (b *Bed) boot(ctx context.Context, t *testing.T, dir, path string) {
	t.Helper()
	// Sockets are made below it, so it has a short name.
	home, err := os.MkdirTemp("", "smolvm-kvm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(home); err != nil {
			t.Errorf("remove the directory of the outer machine: %v", err)
		}
	})
	config := manager.Config{
		DataDir: filepath.Join(home, "data"), SocketDir: filepath.Join(home, "run"),
		Backend: "qemu", Embedded: true, AgentPath: testenv.Agent(t),
		Templates: manager.TemplateConfig{Disabled: true},
	}
	if err := os.MkdirAll(config.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "images"), filepath.Join(config.DataDir, "images")); err != nil {
		t.Fatal(err)
	}
	if b.vms, err = manager.Open(ctx, config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.close(t))
	made, err := b.vms.Image(ctx, imageName)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.vms.Create(ctx, smolvm.VMConfig{
		ID: machineID, VCPUs: machineCPUs, MemoryMiB: machineMiB, Image: imageName, Ephemeral: true, NestedVirtualization: true,
		BootArgs: made.BootArgs + " " + steadyTimer,
		Drives:   []smolvm.Drive{{Path: path, Format: smolvm.FormatRaw}},
	}, smolvm.CreateOptions{})
	if err == nil {
		_, err = b.vms.Start(ctx, machineID, smolvm.StartOptions{Timeout: bootTimeout, Cold: true})
	}
	if err != nil {
		t.Fatalf("the outer machine does not boot: %v\n%s", err, b.console())
	}
	var said bytes.Buffer
	status, err := b.vms.Exec(ctx, machineID, smolvm.Command{Args: []string{"sh", "-c", setUp}, Stdout: &said, Stderr: &said})
	if err != nil || !status.Success() {
		t.Fatalf("set the outer machine up: %s, %v: %s\n%s", status, err, said.String(), b.console())
	}
}

// close returns what ends the outer machine.
func (b *Bed) close(t *testing.T) func() {
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := b.vms.Delete(ctx, machineID, smolvm.DeleteOptions{}); err != nil && !errors.Is(err, smolvm.ErrVMNotFound) {
			t.Errorf("delete the outer machine: %v", err)
		}
		if err := b.vms.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

// console returns the end of what the outer machine's kernel has said.
func (b *Bed) console() string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	log, err := b.vms.Logs(ctx, machineID, smolvm.LogOptions{Tail: consoleLines})
	if err != nil {
		return fmt.Sprintf("its console can't be read: %v", err)
	}
	defer func() { _ = log.Close() }()
	text, err := io.ReadAll(log)
	if err != nil {
		return fmt.Sprintf("its console can't be read: %v", err)
	}
	return "its console ends with:\n" + strings.TrimSpace(string(text))
}

// Run runs a job in the outer machine, and reports its tests as subtests of t.
func (b *Bed) Run(t *testing.T, job Job) {
	runJob(t, job, func(ctx context.Context, out io.Writer) error {
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
			_, err := b.vms.Exec(ctx, machineID, smolvm.Command{Args: []string{"true"}})
			return err
		})
		defer stop()
		status, err := b.vms.Exec(ctx, machineID, command)
		switch {
		case err != nil:
			return fmt.Errorf("%w\n%s", errors.Join(err, context.Cause(ctx)), b.console())
		case !status.Success():
			return errors.New(status.String())
		}
		return nil
	})
}

// runJob reports the tests of a job, which start runs, as subtests of t. The test binary
// writes what test2json understands.
func runJob(t *testing.T, job Job, start func(ctx context.Context, out io.Writer) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), job.timeout()+grace)
	defer cancel()
	read, write := io.Pipe()
	convert := exec.CommandContext(t.Context(), "go", "tool", "test2json")
	convert.Stdin = read
	var complaint bytes.Buffer
	convert.Stderr = &complaint
	events, err := convert.StdoutPipe()
	if err == nil {
		err = convert.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		err := start(ctx, write)
		_ = write.Close()
		ended <- err
	}()
	tests, err := report(t, events, job.maySkip)
	_ = read.CloseWithError(io.ErrClosedPipe)
	err = errors.Join(err, convert.Wait())
	if runErr := <-ended; runErr != nil && !t.Failed() || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Errorf("the tests of %s: %v", job.Package, runErr)
	} else if runErr != nil {
		t.Log(runErr)
	}
	switch {
	case err != nil:
		t.Errorf("read what the tests say: %v: %s", err, complaint.String())
	case tests == 0 && !t.Failed():
		t.Errorf("package %s has no test that fits %q", job.Package, job.Flags)
	}
}
