package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Names of accelerators.
const (
	KVM = "kvm" // hardware virtualization
	TCG = "tcg" // QEMU's emulation in software
)

// Accelerator is what VMs run on.
type Accelerator struct {
	// Name is [KVM] or [TCG].
	Name string
	// Reason says, for people, why it is not KVM. Empty for KVM.
	Reason string
	// Slowness is how many times longer things may take on it than on a usual host with
	// KVM, for limits of time: from 1 to [maxSlowness]. It is measured for KVM, which a host
	// that is itself a VM may have too, and [EmulationFactor] for TCG.
	Slowness float64
}

const (
	// EmulationFactor is the slowness of [TCG]: a kernel boots about ten times slower, a guest
	// that is up works about four times slower.
	EmulationFactor = 4
	// maxSlowness bounds what a measurement makes of limits of time.
	maxSlowness = 8
	// usualExit is how long a guest is left for at most, from one exit to the next, on a usual
	// host: some microseconds, or some ten on one that is a VM with hardware virtualization.
	usualExit = 25 * time.Microsecond
	// usualLoop is how long the probe's loop takes at most on a usual host that is busy.
	usualLoop = 30 * time.Millisecond
	// probeExits is how many exits of the guest a probe measures. The shortest counts, as a
	// busy host makes others longer.
	probeExits = 50
)

// slowness returns the slowness of KVM that was measured.
func (m measured) slowness() float64 {
	return min(max(1, float64(m.Exit)/float64(usualExit), float64(m.Loop)/float64(usualLoop)), maxSlowness)
}

const (
	kvmDevice = "dev/kvm"
	cacheName = "kvm-probe.json"
	// probeLoop is the length of the probe's loop: about a millisecond on working
	// KVM.
	probeLoop = 1_000_000
	// probeLimit is the time that the loop may take; it leaves room for a busy host.
	probeLimit = 150 * time.Millisecond
	// probeGrace is the time after probeLimit in which the kernel must have given
	// the probe's thread back.
	probeGrace = time.Second
)

// probed is what a probe of KVM found out.
type probed struct {
	// Key names the boot and the device that were probed.
	Key string `json:"key"`
	// Problem says what is wrong; empty: KVM works.
	Problem string `json:"problem,omitempty"`
	measured
}

// measured is how fast KVM runs a guest.
type measured struct {
	// Loop is how long the probe's loop took, and Exit the shortest exit of the guest after
	// it. Zero: it was not measured.
	Loop time.Duration `json:"loop_ns,omitempty"`
	Exit time.Duration `json:"exit_ns,omitempty"`
}

// slowError reports that KVM runs a guest, but so slowly that emulation is faster.
type slowError struct{ done, of int }

func (e *slowError) Error() string {
	return fmt.Sprintf("KVM is there but too slow to use: of a test that takes 1 ms, %d %% were done after %d ms",
		100*e.done/e.of, probeLimit.Milliseconds())
}

var errStuck = errors.New("KVM is there but does not answer")

// Accelerator says what VMs run best on. A /dev/kvm that opens is not yet KVM that
// works (on some hosts, VMs themselves, a stock kernel hangs in it), so a tiny
// guest is run once per boot of the host. That takes a few milliseconds, or 0.2 s
// where KVM turns out to be unusable. If ctx is done before that, it is TCG.
func (h *Host) Accelerator(ctx context.Context) Accelerator {
	return acceleratorOf(h.probeKVM(ctx, true))
}

// Slowness returns the slowness of one of the accelerators; see [Accelerator].
func (h *Host) Slowness(ctx context.Context, accelerator string) float64 {
	if accelerator == KVM {
		if best := h.Accelerator(ctx); best.Name == KVM {
			return best.Slowness
		}
	}
	return EmulationFactor
}

// Has reports whether the host has an accelerator: [KVM], as [Host.Accelerator] finds out,
// or [TCG], which needs nothing.
func (h *Host) Has(ctx context.Context, accelerator string) bool {
	return accelerator == TCG || accelerator == KVM && h.Accelerator(ctx).Name == KVM
}

func acceleratorOf(speed measured, problem error) Accelerator {
	if problem != nil {
		return Accelerator{Name: TCG, Reason: problem.Error(), Slowness: EmulationFactor}
	}
	return Accelerator{Name: KVM, Slowness: speed.slowness()}
}

// probeKVM returns how fast VMs run on KVM, or what keeps them from it. Without useKnown it
// probes in any case.
func (h *Host) probeKVM(ctx context.Context, useKnown bool) (measured, error) {
	device := h.path(kvmDevice)
	if err := access(device); err != nil {
		return measured{}, err
	}
	key, keyErr := h.key(device)
	h.mu.Lock()
	defer h.mu.Unlock()
	if useKnown && keyErr == nil {
		if known := h.recall(key); known != nil {
			return known.measured, known.err()
		}
	}
	speed, problem := h.runProbe(ctx, device)
	// Only what a guest's run has shown is kept. Other errors cost nothing to find
	// again, and may pass: another hypervisor may hold the CPU for now.
	_, slow := errors.AsType[*slowError](problem)
	if keyErr == nil && (problem == nil || slow || errors.Is(problem, errStuck)) {
		h.remember(key, speed, problem)
	}
	return speed, problem
}

// access reports whether the device is there and may be used.
func access(device string) error {
	err := unix.Faccessat(unix.AT_FDCWD, device, unix.R_OK|unix.W_OK, unix.AT_EACCESS)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("this host has no /dev/kvm: %w", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("this user may not use /dev/kvm: %w", err)
	default:
		return fmt.Errorf("look at /dev/kvm: %w", err)
	}
}

// probeVersion changes whenever a probe finds out more.
const probeVersion = "2"

// key names what a probe's result holds for: the device node (which a newly loaded
// module makes anew) in this boot of the host.
func (h *Host) key(device string) (string, error) {
	var stat unix.Stat_t
	if err := unix.Stat(device, &stat); err != nil {
		return "", err
	}
	boot := strings.TrimSpace(h.read("proc/sys/kernel/random/boot_id"))
	if boot == "" {
		return "", errors.New("the host's boot has no id")
	}
	return fmt.Sprintf("%s %s %d %d %d %d.%09d", probeVersion, boot, stat.Dev, stat.Ino, stat.Rdev, stat.Ctim.Sec, stat.Ctim.Nsec), nil
}

func (p *probed) err() error {
	if p.Problem == "" {
		return nil
	}
	return errors.New(p.Problem)
}

// recall returns what is known for the key, or nil.
func (h *Host) recall(key string) *probed {
	if h.known != nil && h.known.Key == key {
		return h.known
	}
	if h.cacheDir == "" {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(h.cacheDir, cacheName))
	if err != nil {
		return nil
	}
	var known probed
	if json.Unmarshal(text, &known) != nil || known.Key != key {
		return nil
	}
	h.known = &known
	return h.known
}

// remember keeps a result. That the cache can't be written is no error: the next
// process then probes again.
func (h *Host) remember(key string, speed measured, problem error) {
	h.known = &probed{Key: key, measured: speed}
	if problem != nil {
		h.known.Problem = problem.Error()
	}
	if h.cacheDir == "" {
		return
	}
	text, err := json.Marshal(h.known)
	if err != nil || os.MkdirAll(h.cacheDir, 0o700) != nil {
		return
	}
	// Renamed into place, so that a reader never sees half of it.
	file, err := os.CreateTemp(h.cacheDir, cacheName+".*")
	if err != nil {
		return
	}
	_, err = file.Write(text)
	err = errors.Join(err, file.Close())
	if err == nil {
		err = os.Rename(file.Name(), filepath.Join(h.cacheDir, cacheName))
	}
	if err != nil {
		_ = os.Remove(file.Name())
	}
}

// runProbe runs the probe on a goroutine of its own, so that a kernel which does
// not give it back can't hold the caller up.
func (h *Host) runProbe(ctx context.Context, device string) (measured, error) {
	type outcome struct {
		speed measured
		err   error
	}
	result := make(chan outcome, 1)
	go func() {
		speed, err := h.probe(device, probeLoop, probeLimit)
		result <- outcome{speed, err}
	}()
	stuck := time.NewTimer(probeLimit + probeGrace)
	defer stuck.Stop()
	select {
	case o := <-result:
		return o.speed, o.err
	case <-ctx.Done():
		return measured{}, fmt.Errorf("probe KVM: %w", context.Cause(ctx))
	case <-stuck.C:
		return measured{}, errStuck
	}
}
