package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/cgroup"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/confine"
	"github.com/smolvm/smolvm/internal/vmm/console"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
)

// instance implements [vmm.Instance].
type instance struct {
	cfg     vmm.Config
	version api.Version // set before the guest is started
	process process
	api     *api.Client
	dir     *runDir
	limits  *confine.Limits
	// The guest's console, and Firecracker's own output.
	console, log *ring.Piped
	consoleEnd   *os.File // Firecracker's end of the console, until the guest runs
	metrics      *metrics
	ending       *ending

	// running holds one while the guest is saved, paused or continued, and guards paused.
	running chan struct{}
	paused  bool

	mu      sync.Mutex // guards the following
	killed  bool       // Kill was called while the guest ran
	halted  bool       // the guest has halted, and Firecracker was ended
	channel *channel   // nil: it is not open
	opening bool       // it is being opened
	reset   bool       // the guest has been told that its connections are gone; see connect

	done chan struct{}
	exit vmm.Exit // written before done is closed
}

var (
	_ vmm.Instance    = (*instance)(nil)
	_ vmm.Consoler    = (*instance)(nil)
	_ vmm.Limiter     = (*instance)(nil)
	_ vmm.Meter       = (*instance)(nil)
	_ vmm.DiskLimiter = (*instance)(nil)
	_ vmm.Pauser      = (*instance)(nil)
	_ vmm.Saver       = (*instance)(nil)

	_ vmm.ChannelResetter = (*instance)(nil)
)

// errEnded is the error of calls to a Firecracker that has ended.
var errEnded = errors.New("Firecracker has ended") //nolint:staticcheck // its name

// PID implements [vmm.Instance].
func (i *instance) PID() int { return i.process.PID() }

// Done implements [vmm.Instance].
func (i *instance) Done() <-chan struct{} { return i.done }

// Exit implements [vmm.Instance].
func (i *instance) Exit() vmm.Exit { return i.exit }

// ConsoleTail implements [vmm.Consoler].
func (i *instance) ConsoleTail(n int) string { return i.console.Tail(n) }

// Limits implements [vmm.Limiter].
func (i *instance) Limits() smolvm.Limits { return i.limits.Report() }

// SetCPULimit implements [vmm.Limiter].
func (i *instance) SetCPULimit(_ context.Context, cpus float64) error {
	return i.limits.SetCPUs(cpus, i.PID())
}

// Shutdown implements [vmm.Instance]. A guest whose init has not asked for the keys restarts
// by them, which ends it too. Other machines than PCs have no such keys.
func (i *instance) Shutdown(ctx context.Context) error {
	if runtime.GOARCH != "amd64" {
		return nil
	}
	err := i.api.Do(ctx, api.SendCtrlAltDel)
	if err != nil && (errors.Is(err, api.ErrBroken) || i.ended()) {
		return nil // it has ended, or is about to
	}
	return err
}

// Pause implements [vmm.Pauser].
func (i *instance) Pause(ctx context.Context) error {
	if i.cfg.Channel && api.PauseBreaksVsock(i.version) {
		return fmt.Errorf("pause the VM: %w: Firecracker %s loses the guest channel by it; other releases than 1.16 don't", smolvm.ErrUnsupported, i.version)
	}
	return i.setPaused(ctx, true)
}

// Resume implements [vmm.Pauser].
func (i *instance) Resume(ctx context.Context) error { return i.setPaused(ctx, false) }

func (i *instance) setPaused(ctx context.Context, paused bool) error {
	unlock, err := i.lockRunning(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if i.paused == paused {
		return nil
	}
	return i.setState(ctx, paused)
}

// setState is setPaused for who has the lock. Firecracker finishes what it was told even if
// nobody waits for it, so the state is taken as what it was told last.
func (i *instance) setState(ctx context.Context, paused bool) error {
	state := api.Resumed
	if paused {
		state = api.Paused
	}
	err := i.api.SetState(ctx, state)
	if _, refused := errors.AsType[*api.Fault](err); !refused {
		i.paused = paused
	}
	return err
}

// lockRunning keeps the guest from being saved, paused or continued by others.
func (i *instance) lockRunning(ctx context.Context) (unlock func(), err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return vmm.TakeTurn(ctx, i.running, i.done, errEnded)
}

// Kill implements [vmm.Instance]. Nothing has to be written out: what a guest writes to its
// drives is in the files when the guest is told that it is.
func (i *instance) Kill(ctx context.Context) error {
	i.mu.Lock()
	i.killed = i.killed || !i.halted
	i.mu.Unlock()
	if err := i.process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	return proc.KillLate(ctx, i.process, i.done)
}

func (i *instance) ended() bool {
	select {
	case <-i.done:
		return true
	default:
		return false
	}
}

// watch waits for Firecracker's end and finds out why it came.
func (i *instance) watch(site cgroup.Site) {
	tidied := make(chan struct{})
	go func() {
		defer close(tidied)
		site.Tidy() // what VMs have left whose shim was killed
	}()
	i.awaitEnd()
	i.console.Drain()
	i.log.Drain()
	i.exit = i.classify()
	_ = i.release()
	<-tidied
	close(i.done)
}

// release lets go of all that there is. Nothing of it is in use.
func (i *instance) release() error {
	var errs []error
	if i.api != nil {
		i.api.Close()
	}
	for _, log := range []*ring.Piped{i.console, i.log} {
		if log != nil {
			errs = append(errs, log.Close())
		}
	}
	if i.metrics != nil {
		errs = append(errs, i.metrics.close())
	}
	if i.limits != nil {
		i.limits.Remove()
	}
	if i.dir != nil {
		errs = append(errs, i.dir.remove())
	}
	return errors.Join(errs...)
}

// lastWords is how much of the end of the logs the words are looked for in that Firecracker
// ended with, in bytes, and wordLines how many lines of it.
const (
	lastWords = 4 << 10
	wordLines = 5
)

// cpuShutDown is what Firecracker logs when a guest's CPU has shut down: an exception came while
// the handler of another was looked for, and once more.
const cpuShutDown = "Received KVM_EXIT_SHUTDOWN"

func (i *instance) classify() vmm.Exit {
	i.mu.Lock()
	defer i.mu.Unlock()
	exit := vmm.Exit{At: time.Now().UTC()}
	switch {
	case i.killed:
		exit.Reason = vmm.ExitKilled
	case i.halted:
		exit.Reason = vmm.ExitPowerOff
	case i.booted() && strings.Contains(i.log.Tail(lastWords), cpuShutDown):
		// Releases of before 2026 end with success then, as after a reset; later ones don't. It is
		// also how a kernel resets the machine that knows no other way.
		exit.Reason, exit.Detail = vmm.ExitReboot, "its CPU shut down, by a triple fault"
	case i.process.Success() && i.booted():
		exit.Reason = vmm.ExitReboot
		// With panic=1 a kernel resets the machine after a panic.
		if line := console.PanicLine(i.console.Tail(console.PanicText)); line != "" {
			exit.Reason, exit.Detail = vmm.ExitPanic, line
		} else if i.ending.seen() == console.Halted { // by firmware, as on arm64
			exit.Reason = vmm.ExitPowerOff
		}
	default:
		exit.Reason = vmm.ExitCrashed
		exit.Detail = "Firecracker: " + explainExit(i.process.Exit())
		words := ring.LastLines(i.log.Tail(lastWords), wordLines)
		if words == "" { // it was too early for a log
			words = ring.LastLines(i.console.Tail(lastWords), wordLines)
		}
		if words != "" {
			exit.Detail += ": " + words
		}
		if why := i.limits.Killed(); why != "" {
			exit.Detail += ": " + why
		}
	}
	return exit
}

// booted reports whether Firecracker has got so far that a guest can have ended it.
func (i *instance) booted() bool { return i.version != api.Version{} }

// explainExit adds what Firecracker means by the status that it ended with; see FcExitCode in
// its src/vmm/src/lib.rs.
func explainExit(status string) string {
	means := map[string]string{
		"exit status 148": "it made a system call that its seccomp filter forbids",
		"exit status 149": "SIGBUS, as when a file that is mapped was cut or its disk is full",
		"exit status 150": "SIGSEGV",
		"exit status 151": "a file grew beyond a limit",
		"exit status 152": "its configuration is bad",
		"exit status 153": "its arguments are bad",
		"exit status 154": "it used up its processor time",
		"exit status 155": "SIGPIPE",
		"exit status 156": "SIGHUP",
		"exit status 157": "SIGILL",
	}[status]
	if means == "" {
		return status
	}
	return status + " (" + means + ")"
}
