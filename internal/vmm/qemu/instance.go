package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/confine"
	"github.com/smolvm/smolvm/internal/vmm/console"
)

// instance implements [vmm.Instance].
type instance struct {
	cfg     vmm.Config
	machine string // QEMU's
	child   *proc.Child
	control *net.UnixConn
	channel *net.UnixConn
	qmp     *qmp
	// The guest's console, and QEMU's own output.
	console, log *ring.Piped
	limits       *confine.Limits
	diskNames    *strings.Replacer // see there

	mu       sync.Mutex // guards the following
	shutdown string     // the reason that QEMU gave for its end
	killed   bool       // Kill was called before QEMU gave any
	// channelTaken is set when the channel has been handed out.
	channelTaken bool
	stopped      time.Time // when the guest was last held
	stopping     func()    // called when the guest is held; nil: nothing
	// How often QEMU has held the guest by itself, why the last time, and whether it does.
	haltsSeen int
	lastHalt  vmm.Halt
	isHalted  bool
	switches  int            // counts overlays
	disks     map[int]string // nodes of drives that have got overlays; see diskSwitch

	running   chan struct{} // holds one while the guest is saved, held or continued
	migration chan string   // the states that a migration goes through

	findRAM func(pid int, size int64, fromFile bool) (*guestRAM, error) // tests have others

	resumed chan struct{} // receives when the guest goes on
	halts   chan vmm.Halt // receives why QEMU holds the guest

	done chan struct{}
	exit vmm.Exit // written before done is closed
}

var (
	_ vmm.Instance = (*instance)(nil)
	_ vmm.Consoler = (*instance)(nil)
	_ vmm.Limiter  = (*instance)(nil)
	_ vmm.Meter    = (*instance)(nil)
	_ vmm.Pauser   = (*instance)(nil)
	_ vmm.Saver    = (*instance)(nil)
	_ vmm.Halter   = (*instance)(nil)

	_ vmm.DiskLimiter  = (*instance)(nil)
	_ vmm.DiskSwitcher = (*instance)(nil)
)

// PID implements [vmm.Instance].
func (i *instance) PID() int { return i.child.PID() }

// OpenChannel implements [vmm.Instance]. The stream is there before QEMU starts, and QEMU has
// no other once it was closed.
func (i *instance) OpenChannel(ctx context.Context) (vmm.Channel, error) {
	if err := i.takeChannel(ctx); err != nil {
		return nil, fmt.Errorf("open the guest channel of VM %q: %w", i.cfg.ID, err)
	}
	return i.channel, nil
}

func (i *instance) takeChannel(ctx context.Context) error {
	switch {
	case i.channel == nil:
		return fmt.Errorf("%w: the VM was started without one", smolvm.ErrUnsupported)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case i.ended():
		return errQMPClosed
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.channelTaken {
		return vmm.ErrChannelTaken
	}
	i.channelTaken = true
	return nil
}

// Done implements [vmm.Instance].
func (i *instance) Done() <-chan struct{} { return i.done }

// Exit implements [vmm.Instance].
func (i *instance) Exit() vmm.Exit { return i.exit }

// ConsoleTail implements [vmm.Consoler].
func (i *instance) ConsoleTail(n int) string { return i.console.Tail(n) }

// Shutdown implements [vmm.Instance].
func (i *instance) Shutdown(ctx context.Context) error {
	return i.unlessGone(i.qmp.execute(ctx, "system_powerdown", nil))
}

// Pause implements [vmm.Pauser].
func (i *instance) Pause(ctx context.Context) error {
	return i.setRunning(ctx, "stop")
}

// Resume implements [vmm.Pauser].
func (i *instance) Resume(ctx context.Context) error {
	return i.setRunning(ctx, "cont")
}

func (i *instance) setRunning(ctx context.Context, command string) error {
	unlock, err := i.lockRunning(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return i.qmp.settle(ctx, request{Execute: command})
}

// Halts implements [vmm.Halter].
func (i *instance) Halts() <-chan vmm.Halt { return i.halts }

// Kill implements [vmm.Instance].
func (i *instance) Kill(ctx context.Context) error {
	i.mu.Lock()
	i.killed = i.killed || i.shutdown == ""
	i.mu.Unlock()
	// Asked to quit, QEMU writes out what the guest has written to its disks. One that
	// can't be asked takes a signal for the same.
	if err := i.qmp.execute(ctx, "quit", nil); err != nil && !i.ended() {
		_ = i.child.Signal(unix.SIGTERM)
	}
	return proc.KillLate(ctx, i.child, i.done)
}

func (i *instance) ended() bool {
	select {
	case <-i.done:
		return true
	default:
		return false
	}
}

// unlessGone makes a success of a command to a QEMU that has ended.
func (i *instance) unlessGone(err error) error {
	if errors.Is(err, errQMPClosed) {
		return nil
	}
	return err
}

// handle notes what QEMU tells of the guest and of itself.
func (i *instance) handle(e event) {
	var data struct {
		Reason string `json:"reason"`
		Status string `json:"status"`
		ioError
	}
	if len(e.Data) > 0 && json.Unmarshal(e.Data, &data) != nil {
		return
	}
	switch e.Name {
	case "SHUTDOWN":
		i.ending(data.Reason)
	case "GUEST_PANICKED":
		i.ending("guest-panic")
	case "BLOCK_IO_ERROR":
		if data.Action == "stop" {
			i.halted(vmm.Halt{Drive: data.drive(), NoSpace: data.NoSpace, Detail: data.Reason})
		}
	case "RESUME":
		i.mu.Lock()
		i.isHalted = false
		i.mu.Unlock()
		select {
		case i.resumed <- struct{}{}:
		default: // nobody waits for it any more
		}
	case "STOP":
		i.mu.Lock()
		i.stopped = time.Now()
		if i.stopping != nil {
			i.stopping()
		}
		i.mu.Unlock()
	case "MIGRATION":
		select {
		case i.migration <- data.Status:
		default: // nobody has asked for so many
		}
	}
}

// ioError is what the event BLOCK_IO_ERROR tells, beside its reason; see QEMU's
// qapi/block-core.json.
type ioError struct {
	Action  string `json:"action"` // "stop": the guest is held until it is told to go on
	NoSpace bool   `json:"nospace"`
	// Names of the drive, of which some may be empty.
	Device string `json:"device"`
	Node   string `json:"node-name"`
	Path   string `json:"qom-path"`
}

// drive is the number of the drive that an error is of; negative if it is none of ours.
func (e ioError) drive() int {
	for _, name := range []string{e.Device, e.Node, e.Path} {
		_, rest, found := strings.Cut(name, driveName)
		digits := len(rest) - len(strings.TrimLeft(rest, "0123456789"))
		if n, err := strconv.Atoi(rest[:digits]); found && err == nil {
			return n
		}
	}
	return -1
}

// halted tells that QEMU holds the guest; the latest reason is the one that counts.
func (i *instance) halted(halt vmm.Halt) {
	i.mu.Lock()
	i.haltsSeen, i.lastHalt, i.isHalted = i.haltsSeen+1, halt, true
	i.mu.Unlock()
	select {
	case <-i.halts:
	default:
	}
	i.halts <- halt // only this goroutine sends
}

// ending notes why QEMU ends.
func (i *instance) ending(reason string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.shutdown == "" {
		i.shutdown = reason
	}
}

// watch waits for QEMU's end and finds out why it came.
func (i *instance) watch(tidied <-chan struct{}) {
	<-i.child.Done()
	<-i.qmp.done // all events have been handled then
	i.console.Drain()
	i.log.Drain()
	i.exit = i.classify()
	_ = i.closeConns()
	i.limits.Remove()
	<-tidied
	close(i.done)
}

func (i *instance) closeConns() error {
	errs := []error{i.control.Close()}
	if i.channel != nil {
		errs = append(errs, i.channel.Close())
	}
	for _, log := range []*ring.Piped{i.console, i.log} {
		if log != nil {
			errs = append(errs, log.Close())
		}
	}
	return errors.Join(errs...)
}

// lastWords is how much of the end of the log the words are looked for in that QEMU ended
// with, in bytes.
const lastWords = 4 << 10

func (i *instance) classify() vmm.Exit {
	i.mu.Lock()
	defer i.mu.Unlock()
	exit := vmm.Exit{At: now()}
	switch {
	case i.killed:
		exit.Reason = vmm.ExitKilled
	case i.shutdown == "guest-shutdown":
		exit.Reason = vmm.ExitPowerOff
	case i.shutdown == "guest-reset", i.shutdown == "guest-panic":
		exit.Reason = vmm.ExitReboot
		// With panic=1 a kernel resets the machine after a panic.
		if line := console.PanicLine(i.console.Tail(console.PanicText)); line != "" || i.shutdown == "guest-panic" {
			exit.Reason, exit.Detail = vmm.ExitPanic, line
		}
	default:
		exit.Reason = vmm.ExitCrashed
		exit.Detail = "QEMU: " + i.child.Exit()
		if words := ring.LastLines(i.log.Tail(lastWords), 5); words != "" {
			exit.Detail += ": " + i.diskNames.Replace(words)
		}
		if why := i.limits.Killed(); why != "" {
			exit.Detail += ": " + why
		}
	}
	return exit
}
