package start

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/backing"
	"github.com/smolvm/smolvm/internal/datadir"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/hostdir"
	"github.com/smolvm/smolvm/internal/identity"
	"github.com/smolvm/smolvm/internal/machine"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/secret"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/store"
	"github.com/smolvm/smolvm/internal/template"
)

// run is one start of a VM.
type run struct {
	*Starter
	plan Plan
	// vm is the VM with what this start has changed of it.
	vm store.VM

	launch    shim.LaunchOptions
	listeners []boundForward

	phaseBegan time.Time
	report     smolvm.StartReport
	// guestRan reports whether the guest ran in the last attempt.
	guestRan bool
	// diskTouched says that the disk is not, or may not be, what a boot is to begin with.
	diskTouched bool

	// makesDisk reports whether there is no disk yet: each way makes it.
	makesDisk bool

	// kind is the template's that the VM can be a clone of; empty: there can be none.
	kind template.Kind
	// kindLock is the lock of that kind, if its template is to be made.
	kindLock *os.File
}

// close lets go of what the start has held.
func (r *run) close() {
	closeAll(r.listeners)
	if r.kindLock != nil {
		_ = r.kindLock.Close()
	}
}

// dropDisk removes a disk that this start has made and nobody has used, so that the next one
// makes it of what that starts from.
func (r *run) dropDisk() error {
	if !r.makesDisk || r.guestRan {
		return nil
	}
	if err := os.Remove(r.vm.DiskPath); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// phase ends a phase of the start.
func (r *run) phase(name string) {
	now := time.Now()
	r.report.Timeline = append(r.report.Timeline, smolvm.Phase{Name: name, Duration: now.Sub(r.phaseBegan)})
	r.phaseBegan = now
}

func (r *run) warn(err error) { r.report.Warnings = append(r.report.Warnings, err.Error()) }

// prepare makes the VM's disk, if it is not there, its directories, and the shim's orders.
func (r *run) prepare(ctx context.Context) error {
	restores := r.plan.From != nil
	r.diskTouched = restores && r.vm.State != smolvm.StateCreated // its own disk is not that of the snapshot
	if r.vm.State == smolvm.StateError && !restores {
		r.warn(fmt.Errorf("it had failed (%s); it was booted from its disk, which is as after a power cut", r.vm.Cause))
	}
	if r.vm.State == smolvm.StateCreated && r.vm.Layer != "" && !restores {
		r.warn(errors.New("it was to go on from a snapshot, or as a fork, and that was cut short; it was booted from the disk of that"))
	}
	if err := r.Machines.EnsureDisk(ctx, r.vm); err != nil {
		return err
	}
	if disk.FormatOf(r.vm.DiskPath) == disk.Raw && disk.IsUnwritten(r.vm.DiskPath) {
		r.makesDisk, r.diskTouched = true, true
	}
	step.Reached(ctx, "start/disk")
	var err error
	if r.launch, err = r.orders(ctx); err != nil {
		return err
	}
	r.report.Backend, r.report.Accelerator = r.vm.Backend, r.launch.Spec.VMM.Accelerator
	r.phase("prepare")
	return nil
}

// orders makes the directories of a start, and returns what the shim is told.
func (r *run) orders(ctx context.Context) (shim.LaunchOptions, error) {
	vm := r.vm
	program, err := r.Program()
	if err != nil {
		return shim.LaunchOptions{}, err
	}
	dir := r.Dir.VM(vm.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return shim.LaunchOptions{}, err
	}
	if err := glob.Remove(dir, "*"+backing.OverlaySuffix); err != nil { // of a run that died while it was saved
		return shim.LaunchOptions{}, err
	}
	runtimeDir := r.RuntimeDir(vm.ID)
	if err := datadir.MakeRuntimeParent(runtimeDir); err != nil {
		return shim.LaunchOptions{}, err
	}
	accelerator, err := r.Accelerator(ctx, vm.Backend)
	if err != nil {
		return shim.LaunchOptions{}, err
	}
	runs, err := r.Machines.Config(ctx, vm, accelerator)
	if err != nil {
		return shim.LaunchOptions{}, err
	}
	at, err := machine.Addresses(vm)
	if err != nil {
		return shim.LaunchOptions{}, err
	}
	attached := machine.Network(vm, at)
	if attached != nil {
		attached.MTU = r.Machines.MTU(vm.Backend, at.Mode)
		if attached.Egress, err = egressOf(vm); err != nil {
			return shim.LaunchOptions{}, err
		}
	}
	if err := r.checkMounts(runtimeDir); err != nil {
		return shim.LaunchOptions{}, err
	}
	secrets, err := secret.Resolve(vm.Config.Secrets)
	if err != nil {
		return shim.LaunchOptions{}, err
	}
	spec := shim.Spec{
		ID:           vm.ID,
		Run:          shim.NewRun(),
		Backend:      vm.Backend,
		VMM:          runs,
		Network:      attached,
		Secrets:      secrets,
		Mounts:       vm.Config.Mounts,
		User:         vm.Config.User,
		Ready:        vm.Config.Ready,
		ReadyTimeout: cmp.Or(r.plan.Options.Timeout, r.Machines.BootTimeout(ctx, accelerator)),
		TTL:          vm.Config.TTL,
		WarmUp:       warmUpOf(vm),
		Ephemeral:    vm.Config.Ephemeral,
		FlowLog:      r.Dir.Flows(vm.ID),
		RuntimeDir:   runtimeDir,
		Origin:       shim.Origin{DataDir: r.Dir.Root(), State: vm.State},
	}
	if check := vm.Config.Healthcheck; check != nil && vm.Config.UsesImage() {
		spec.Health = &shim.Health{Check: *check, User: vm.Config.User, Dir: vm.Config.WorkingDir}
	}
	if vm.Config.UsesImage() {
		client, err := r.ClientKey()
		if err != nil {
			return shim.LaunchOptions{}, err
		}
		spec.Hello, err = identity.Guest{
			Hostname:       vm.Config.Hostname,
			MachineID:      vm.MachineID,
			HostKey:        vm.HostKey,
			AuthorizedKeys: vm.Config.AuthorizedKeys,
			Env:            vm.Config.Env,
			Network:        identity.NetworkOf(at),
		}.Hello(client.PublicKey())
		if err != nil {
			return shim.LaunchOptions{}, err
		}
	}
	return shim.LaunchOptions{
		Program: program, Spec: spec, LogPath: filepath.Join(dir, "shim.log"), Without: secret.Variables(vm.Config.Secrets),
	}, nil
}

// checkMounts returns an error if a directory of the host can't be given to the guest any more.
func (r *run) checkMounts(runtimeDir string) error {
	for _, mount := range r.vm.Config.Mounts {
		if err := hostdir.Check(mount.Source, r.Dir.Root(), filepath.Dir(runtimeDir)); err != nil {
			return &smolvm.Error{
				Hint: fmt.Sprintf("the VM has it as %s; put it back, or make an empty one with mkdir -p %s", mount.Target, mount.Source),
				Err:  fmt.Errorf("mount at %s: %w", mount.Target, err),
			}
		}
	}
	return nil
}

// egressOf returns the egress policy of a VM; nil: it was given none.
func egressOf(vm store.VM) (*network.Egress, error) {
	if vm.Config.Egress == nil {
		return nil, nil //nolint:nilnil // None is what an order has then.
	}
	policy, err := network.PolicyOf(*vm.Config.Egress)
	if err != nil {
		return nil, err
	}
	return &network.Egress{Revision: vm.EgressRevision, Policy: policy}, nil
}

// warmUpOf returns what a VM runs when it boots: only in the first boot that succeeds, as in a
// clone.
func warmUpOf(vm store.VM) string {
	if vm.State != smolvm.StateCreated && vm.Run != "" {
		return ""
	}
	return vm.Config.WarmUp
}

// listen binds the host ports of the VM, for the shim to take over.
func (r *run) listen(ctx context.Context) (err error) {
	if r.listeners, err = r.bind(ctx, &r.vm); err != nil {
		return err
	}
	for _, bound := range r.listeners {
		r.launch.Listeners = append(r.launch.Listeners, bound.listener)
		r.launch.Spec.Forwards = append(r.launch.Spec.Forwards, bound.forward)
	}
	return nil
}

// prepareNext has the template built, or the pool filled, for the next start of this kind.
func (r *run) prepareNext() {
	var err error
	switch {
	case r.report.Method == smolvm.StartPool:
		err = r.Background.FillPool(r.kind.Key())
	case r.kindLock != nil:
		config := r.vm.Config
		err = r.Background.BuildTemplate(r.kind, smolvm.VMConfig{
			Image: config.Image, VCPUs: config.VCPUs, MemoryMiB: config.MemoryMiB, DiskSizeMiB: config.DiskSizeMiB, WarmUp: config.WarmUp,
			Network: smolvm.Network{Mode: r.kind.Hardware.NIC.Mode()},
		}, r.kindLock)
	}
	if err != nil {
		r.warn(fmt.Errorf("prepare the next start: %w", err))
	}
}
