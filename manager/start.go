package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/start"
	"github.com/smolvm/smolvm/internal/store"
)

// Start starts a VM that does not run, and returns when it is ready as its
// configuration says. The first start of a VM is a clone of a template of its kind, or
// a VM from a pool, if there is one; all others boot. [smolvm.VMInfo].Start tells which
// it was, and what kept it from being a faster one. A VM in [smolvm.StateError] boots from
// its disk, which is as after a power cut; a warning tells so.
//
// On failure nothing is left running. If the guest has run, the VM is in
// [smolvm.StateError], and the error quotes the end of its console log; otherwise the VM is
// in the state that it was in. [smolvm.VMInfo].Cause tells why in either case.
//
// The error matches [smolvm.ErrVMNotFound], [smolvm.ErrInvalidState] or
// [smolvm.ErrBootTimeout], or is a [*smolvm.NetworkError] or a
// [*smolvm.PrerequisiteError].
func (m *Manager) Start(ctx context.Context, id string, opts smolvm.StartOptions) (smolvm.VMInfo, error) {
	return m.startFrom(ctx, id, opts, nil, nil)
}

// startFrom is Start of a VM that is to go on from a saved guest, if that is not nil, and
// nothing is wrong with it.
func (m *Manager) startFrom(ctx context.Context, id string, opts smolvm.StartOptions, from *start.Saved, damage error) (smolvm.VMInfo, error) {
	vm, lock, err := m.acquire(ctx, id)
	if err != nil {
		return smolvm.VMInfo{}, err
	}
	defer lock.unlock()
	return m.startLocked(ctx, vm, opts, from, damage)
}

// startLocked is startFrom for the holder of the VM's lock.
func (m *Manager) startLocked(ctx context.Context, vm store.VM, opts smolvm.StartOptions, from *start.Saved, damage error) (smolvm.VMInfo, error) {
	began, id := time.Now(), vm.ID
	if vm.State.Alive() {
		return smolvm.VMInfo{}, stateError("start", vm)
	}
	if err := errors.Join(m.requireBackend(ctx, vm.Backend), requireOpenFiles(), m.budget.Check()); err != nil {
		return smolvm.VMInfo{}, vmError("start", id, err)
	}
	if from != nil && damage != nil {
		damage = fmt.Errorf("%s %s: %w", from.Method, from.Source, damage)
	}
	if from == nil {
		_ = os.Remove(m.keptDisk(id)) // of a process that was killed
	}
	vm, report, err := m.starter.Start(ctx, start.Plan{VM: vm, Options: opts, From: from, Damage: damage})
	if err != nil {
		m.note(ctx, id, "start-failed", began, err.Error())
		return smolvm.VMInfo{}, err
	}
	m.note(ctx, id, "start", began, string(report.Method)+", "+vm.Accelerator)
	info := m.info(vm)
	info.Start = report
	return info, nil
}

// minOpenFiles is how many files a VM's shim and its VMM must be able to have open: some 40
// of their own, and two for each connection.
const minOpenFiles = 256

// requireOpenFiles fails if a VM would run out of files: its VMM would abort in the middle
// of its work.
func requireOpenFiles() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Max >= minOpenFiles {
		return nil //nolint:nilerr // then nobody knows of a limit
	}
	return &smolvm.Error{Hint: "raise the limit, as with `ulimit -n 1024`",
		Err: fmt.Errorf("a process may have only %d files open, and a VM needs %d", limit.Max, minOpenFiles)}
}

// shimCommand is the program that becomes the shim.
func (m *Manager) shimCommand() ([]string, error) {
	switch {
	case m.config.Embedded:
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find this program, which is the VMs' shim too: %w", err)
		}
		return []string{self, shim.Argument}, nil
	case len(m.config.ShimCommand) > 0:
		return m.config.ShimCommand, nil
	}
	path, err := findProgram("smolvm")
	if err != nil {
		return nil, fmt.Errorf("%w; install the smolvm CLI, name it with the ShimCommand option, or make this program its own shim with the Embedded option", err)
	}
	return []string{path, shim.Argument}, nil
}

// readBootID names the host's present boot; empty if that can't be found out.
func readBootID() string {
	id, err := proc.BootID()
	if err != nil {
		return "" // then only a start time tells a reused pid from ours
	}
	return id
}
