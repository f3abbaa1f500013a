// Package firecracker runs VMs by Firecracker, controlled by its API (package api).
//
// Each Firecracker runs in a directory of its own, which is made for it and removed at its
// end. All files are links there with names that are the same for every VM ("kernel",
// "drive0", "memory"), and Firecracker is told those names only. So a guest can be restored as
// that of another VM, whose files are elsewhere, by releases that take no other names then.
// The guest channel is vsock, the console Firecracker's standard output.
package firecracker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// process is that of a Firecracker.
type process interface {
	PID() int
	Done() <-chan struct{}
	Exit() string
	Success() bool
	Signal(sig os.Signal) error
	Kill() error
}

// Options of a [Backend]. The zero value is useful.
type Options struct {
	// ConsoleBytes is the limit of each console. Zero: [ring.ConsoleBytes].
	ConsoleBytes int64
	// Launcher is the program that becomes the launcher of a Firecracker whose VM's network
	// interface is a link, with its first arguments; see Program of [namespace.Options]. Empty:
	// this program, as it is right in a shim.
	Launcher []string
	// Jailer is the path of Firecracker's jailer, of the same release, by which Firecracker
	// is started as a user of its own in a chroot. It takes root. Drives are regular files
	// then, and network interfaces links. Empty: Firecracker runs as this process's user.
	Jailer string
}

// Backend implements [vmm.Backend].
type Backend struct{ opts Options }

var _ vmm.Backend = (*Backend)(nil)

// New returns a Backend.
func New(opts Options) *Backend {
	opts.ConsoleBytes = cmp.Or(opts.ConsoleBytes, ring.ConsoleBytes)
	return &Backend{opts: opts}
}

// Name implements [vmm.Backend].
func (b *Backend) Name() string { return traits.Firecracker().Name }

// Start implements [vmm.Backend].
func (b *Backend) Start(ctx context.Context, cfg vmm.Config) (vmm.Instance, error) {
	binary, err := findBinary(cfg.Binary)
	if err != nil {
		return nil, err
	}
	if err := check(ctx, cfg); err != nil {
		return nil, fmt.Errorf("start Firecracker for VM %q: %w", cfg.ID, err)
	}
	inst, err := b.launch(ctx, binary, cfg, cgroup.Find("/"))
	if err != nil {
		return nil, fmt.Errorf("start Firecracker for VM %q: %w", cfg.ID, err)
	}
	if err := errors.Join(inst.bringUp(ctx, binary), inst.slowConsole()); err != nil {
		return nil, fmt.Errorf("start Firecracker for VM %q: %w", cfg.ID, inst.abandon(ctx, err))
	}
	return inst, nil
}

// bringUp returns when the guest's CPUs run.
func (i *instance) bringUp(ctx context.Context, binary string) error {
	if err := i.awaitAPI(ctx); err != nil {
		return err
	}
	version, err := i.api.Version(ctx)
	if err != nil {
		return err
	}
	i.mu.Lock()
	i.version = version
	i.mu.Unlock()
	if i.version.Before(api.Oldest()) {
		return missing(binary, fmt.Sprintf("it is of version %s, and %s or later is needed", i.version, api.Oldest()), getFirecracker)
	}
	if i.cfg.Restore != nil {
		return i.restore(ctx)
	}
	return i.boot(ctx)
}

// abandon ends a Firecracker that could not be brought up, and returns why: what it has
// printed, if it ended by itself.
func (i *instance) abandon(ctx context.Context, why error) error {
	// A connection that is broken means that it is ending; its own words say why.
	if errors.Is(why, api.ErrBroken) || errors.Is(why, errEnded) {
		select {
		case <-i.done:
			return errors.New(i.exit.Detail)
		case <-ctx.Done(): // it hangs instead
		}
	}
	if err := i.process.Kill(); err != nil {
		return errors.Join(why, err)
	}
	<-i.done // all is released by then
	return why
}

// check returns what is wrong with a configuration, before anything is started for it.
func check(ctx context.Context, cfg vmm.Config) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if cfg.Accelerator != vmm.KVM {
		return fmt.Errorf("%w: Firecracker runs VMs by KVM, and not by %q", smolvm.ErrUnsupported, cfg.Accelerator)
	}
	if cfg.VCPUs > maxVCPUs {
		return fmt.Errorf("%w: Firecracker gives a VM at most %d CPUs, and not %d", smolvm.ErrUnsupported, maxVCPUs, cfg.VCPUs)
	}
	if cfg.NIC != nil {
		if err := cfg.NIC.Validate(); err != nil {
			return err
		}
	}
	for n, drive := range cfg.Drives {
		if drive.Format != "raw" {
			return fmt.Errorf("drive %d, %s: %w: Firecracker uses raw disks, and not %s", n, drive.Path, smolvm.ErrUnsupported, drive.Format)
		}
	}
	return nil
}

// maxVCPUs is the most that Firecracker gives to a VM.
const maxVCPUs = 32

// getFirecracker is what to do without a Firecracker that works.
const getFirecracker = "install a release of https://github.com/firecracker-microvm/firecracker/releases as `firecracker` in PATH"

func findBinary(asked string) (string, error) {
	name := cmp.Or(asked, traits.FirecrackerProgram)
	path, err := exec.LookPath(name)
	if err == nil {
		return filepath.Abs(path)
	}
	problem := "not found: " + err.Error()
	if errors.Is(err, syscall.EACCES) {
		problem = "can't be executed: " + err.Error()
	}
	return "", missing(name, problem, getFirecracker)
}

// missing is the error of a program that is not there or does not do.
func missing(name, problem, fix string) error {
	return &smolvm.PrerequisiteError{Backend: traits.Firecracker().Name, Findings: []smolvm.Finding{{
		Name: name, Severity: smolvm.SeverityError, Problem: problem, Why: "runs the VMs", Fix: fix,
	}}}
}

// explainStart returns why a program could not be started.
func explainStart(binary string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOEXEC):
		return missing(binary, "is no program for this machine's kind of CPU: "+err.Error(), getFirecracker)
	case errors.Is(err, syscall.EACCES):
		return missing(binary, "can't be executed: "+err.Error(), "chmod +x "+binary)
	}
	return err
}

var (
	_ process = (*proc.Child)(nil)
	_ process = (*namespace.Process)(nil)
)
