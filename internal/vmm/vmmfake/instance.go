package vmmfake

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/ring"
	"github.com/smolvm/smolvm/internal/vmm"
)

// request is what the shim asks of the VMM.
type request struct {
	ID int    `json:"id"`
	Op string `json:"op"`
	// Of a saving.
	Memory string `json:"memory,omitempty"`
	State  string `json:"state,omitempty"`
	// Of the switch to an overlay.
	Drive   int    `json:"drive,omitempty"`
	Overlay string `json:"overlay,omitempty"`
}

// Operations of a [request].
const (
	opPause  = "pause"
	opResume = "resume"
	opSave   = "save" // leaves the guest held
	opCancel = "cancel"
	opCheck  = "check" // whether an overlay can be opened
	opSwitch = "switch"
	opButton = "button"
	opQuit   = "quit"
)

// message is what the VMM tells: the answer to a request, or an event.
type message struct {
	ID    int    `json:"id,omitempty"`
	Error string `json:"error,omitempty"`
	// Held says that the guest had been held before.
	Held bool `json:"held,omitempty"`

	Event  string         `json:"event,omitempty"`
	Reason vmm.ExitReason `json:"reason,omitempty"`
	Detail string         `json:"detail,omitempty"`
	Halt   *vmm.Halt      `json:"halt,omitempty"`
}

// Events of a [message].
const (
	eventRunning = "running"
	eventHalt    = "halt"
	eventEnd     = "end"
)

var errEnded = errors.New("the VMM has ended")

// instance implements [vmm.Instance], and all that is optional but the switching of disks.
type instance struct {
	cfg              vmm.Config
	resets           bool   // see [Options]
	address          string // that the channel is connected to then; empty: there is none
	faults           []string
	child            *proc.Child
	control, channel *net.UnixConn
	console, log     *bounded

	mu        sync.Mutex // guards the following
	next      int
	pending   map[int]chan message // those who wait for an answer
	end       *message             // what the VMM said of its end
	killed    bool                 // Kill was called before it did
	limit     float64
	diskLimit vmm.DiskLimit
	// channelTaken is set when the channel has been handed out, until it may be opened again.
	channelTaken bool

	running chan struct{} // holds one while the guest is saved, held or continued
	ready   chan struct{} // closed when the guest runs
	closed  chan struct{} // closed when nothing more comes of the VMM
	halts   chan vmm.Halt
	done    chan struct{}
	exit    vmm.Exit // written before done is closed
}

var (
	_ vmm.Consoler    = (*instance)(nil)
	_ vmm.Limiter     = (*instance)(nil)
	_ vmm.DiskLimiter = (*instance)(nil)
	_ vmm.Pauser      = (*instance)(nil)
	_ vmm.Saver       = (*instance)(nil)
	_ vmm.Halter      = (*instance)(nil)

	_ vmm.DiskSwitcher = (*switchingInstance)(nil)
)

// switchingInstance is an instance that can switch disks.
type switchingInstance struct{ *instance }

// PID implements [vmm.Instance].
func (i *instance) PID() int { return i.child.PID() }

// OpenChannel implements [vmm.Instance]. There is one stream, as with QEMU, unless the backend
// was told otherwise.
func (i *instance) OpenChannel(ctx context.Context) (vmm.Channel, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var err error
	select {
	case <-i.done:
		err = errEnded
	default:
		err = context.Cause(ctx)
	}
	switch {
	case i.channel == nil && i.address == "":
		err = fmt.Errorf("%w: the VM was started without one", smolvm.ErrUnsupported)
	case err == nil && i.channelTaken:
		err = vmm.ErrChannelTaken
	}
	if err != nil {
		return nil, fmt.Errorf("open the guest channel: %w", err)
	}
	if i.resets {
		return i.connect(ctx)
	}
	i.channelTaken = true
	return i.channel, nil
}

// Done implements [vmm.Instance].
func (i *instance) Done() <-chan struct{} { return i.done }

// Exit implements [vmm.Instance].
func (i *instance) Exit() vmm.Exit { return i.exit }

// Halts implements [vmm.Halter].
func (i *instance) Halts() <-chan vmm.Halt { return i.halts }

// ConsoleTail implements [vmm.Consoler].
func (i *instance) ConsoleTail(n int) string { return i.console.Tail(n) }

// Limits implements [vmm.Limiter]. Nothing is enforced.
func (i *instance) Limits() smolvm.Limits {
	i.mu.Lock()
	defer i.mu.Unlock()
	limits := smolvm.Limits{By: "vmmfake", MemoryMiB: i.cfg.MemoryMiB, CPUs: i.cfg.CPULimit}
	if i.limit != 0 {
		limits.CPUs = i.limit
	}
	limits.DiskBytesPerSecond, limits.DiskIOPS = i.diskLimit.BytesPerSecond, i.diskLimit.IOPS
	return limits
}

// SetDiskLimit implements [vmm.DiskLimiter].
func (i *instance) SetDiskLimit(_ context.Context, limit vmm.DiskLimit) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.diskLimit = limit
	return nil
}

// SetCPULimit implements [vmm.Limiter].
func (i *instance) SetCPULimit(_ context.Context, cpus float64) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.limit = cpus
	return nil
}

// Shutdown implements [vmm.Instance].
func (i *instance) Shutdown(ctx context.Context) error {
	_, err := i.ask(ctx, request{Op: opButton})
	if errors.Is(err, errEnded) {
		return nil
	}
	return err
}

// Pause implements [vmm.Pauser].
func (i *instance) Pause(ctx context.Context) error { return i.setRunning(ctx, opPause) }

// Resume implements [vmm.Pauser].
func (i *instance) Resume(ctx context.Context) error { return i.setRunning(ctx, opResume) }

func (i *instance) setRunning(ctx context.Context, op string) error {
	unlock, err := i.lockRunning(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = i.ask(ctx, request{Op: op})
	return err
}

// lockRunning waits until nobody else saves, holds or continues the guest.
func (i *instance) lockRunning(ctx context.Context) (unlock func(), err error) {
	return vmm.TakeTurn(ctx, i.running, i.done, errEnded)
}

// Kill implements [vmm.Instance].
func (i *instance) Kill(ctx context.Context) error {
	i.mu.Lock()
	i.killed = i.killed || i.end == nil
	i.mu.Unlock()
	if _, err := i.ask(ctx, request{Op: opQuit}); err == nil {
		select {
		case <-i.done:
			return nil
		case <-ctx.Done():
		}
	}
	if err := i.child.Kill(); err != nil {
		return err
	}
	<-i.done
	return nil
}

// Save implements [vmm.Saver].
func (i *instance) Save(ctx context.Context, opts vmm.SaveOptions) (*vmm.Hold, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	unlock, err := i.lockRunning(ctx)
	if err != nil {
		return nil, err
	}
	answer, err := i.askToSave(ctx, request{Op: opSave, Memory: opts.Memory, State: opts.State})
	if err != nil {
		unlock()
		return nil, err
	}
	resume := func(ctx context.Context) error {
		_, err := i.ask(ctx, request{Op: opResume})
		return err
	}
	return vmm.NewHold(vmm.Saved{Held: answer.Held}, time.Now(), resume, unlock), nil
}

// OpenOverlays implements [vmm.DiskSwitcher]. They are opened when they are used, and only
// looked at before.
func (i *switchingInstance) OpenOverlays(ctx context.Context, overlays []vmm.Overlay) (vmm.DiskSwitch, error) {
	if err := i.cfg.CheckOverlays(overlays); err != nil {
		return nil, err
	}
	for _, overlay := range overlays {
		if _, err := i.ask(ctx, request{Op: opCheck, Overlay: overlay.Path}); err != nil {
			return nil, err
		}
	}
	return &diskSwitch{i.instance, overlays}, nil
}

// diskSwitch implements [vmm.DiskSwitch].
type diskSwitch struct {
	instance *instance
	overlays []vmm.Overlay
}

// Switch implements [vmm.DiskSwitch].
func (d *diskSwitch) Switch(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	for _, overlay := range d.overlays {
		if _, err := d.instance.ask(context.WithoutCancel(ctx), request{Op: opSwitch, Drive: overlay.Drive, Overlay: overlay.Path}); err != nil {
			return err
		}
	}
	return nil
}

// Close implements [vmm.DiskSwitch].
func (d *diskSwitch) Close() error { return nil }

// askToSave has the VMM make the files, and gives that up when ctx is done. It returns
// when the VMM has answered.
func (i *instance) askToSave(ctx context.Context, r request) (message, error) {
	stop := context.AfterFunc(ctx, func() { _, _ = i.send(request{Op: opCancel}) })
	defer stop()
	answer, err := i.ask(context.WithoutCancel(ctx), r)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("save: %w", context.Cause(ctx))
	}
	return answer, err
}

// ask sends a request and waits for its answer.
func (i *instance) ask(ctx context.Context, r request) (message, error) {
	answer, err := i.send(r)
	if err != nil {
		return message{}, err
	}
	select {
	case got := <-answer:
		if got.Error != "" {
			return got, errors.New(got.Error)
		}
		return got, nil
	case <-i.closed:
		return message{}, errEnded
	case <-ctx.Done():
		return message{}, context.Cause(ctx)
	}
}

func (i *instance) send(r request) (<-chan message, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.next++
	r.ID = i.next
	text, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	answer := make(chan message, 1)
	i.pending[r.ID] = answer
	// A VMM that hangs reads nothing, and what it is sent fits the socket's buffer.
	if _, err := i.control.Write(append(text, '\n')); err != nil {
		return nil, errEnded
	}
	return answer, nil
}

// read takes what the VMM says, to its end.
func (i *instance) read() {
	defer close(i.closed)
	lines := bufio.NewScanner(i.control)
	for lines.Scan() {
		var m message
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			continue
		}
		i.mu.Lock()
		switch m.Event {
		case eventRunning:
			close(i.ready)
		case eventHalt:
			select {
			case <-i.halts:
			default:
			}
			i.halts <- *m.Halt // only this goroutine sends
		case eventEnd:
			i.end = &m
		default:
			i.pending[m.ID] <- m
			delete(i.pending, m.ID)
		}
		i.mu.Unlock()
	}
}

// awaitRunning returns when the guest runs. If it never does, nothing is left.
func (i *instance) awaitRunning(ctx context.Context) error {
	err := ctx.Err()
	if err == nil {
		select {
		case <-i.ready:
			return nil
		case <-i.done:
			return errors.New(i.exit.Detail)
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	err = errors.Join(err, i.child.Kill())
	<-i.done
	return err
}

// watch waits for the VMM's end and finds out why it came.
func (i *instance) watch() {
	<-i.child.Done()
	<-i.closed
	i.console.drain()
	i.log.drain()
	i.mu.Lock()
	i.exit = vmm.Exit{Reason: vmm.ExitCrashed, At: time.Now().UTC()}
	switch {
	case i.killed:
		i.exit.Reason = vmm.ExitKilled
	case i.end != nil:
		i.exit.Reason, i.exit.Detail = i.end.Reason, i.end.Detail
	default:
		i.exit.Detail = "fake VMM: " + i.child.Exit()
		if words := ring.LastLines(i.log.Tail(4<<10), 5); words != "" {
			i.exit.Detail += ": " + words
		}
	}
	i.mu.Unlock()
	_ = i.closeFiles()
	close(i.done)
}

func (i *instance) closeFiles() error {
	var errs []error
	for _, conn := range []*net.UnixConn{i.control, i.channel} {
		if conn != nil {
			errs = append(errs, conn.Close())
		}
	}
	for _, log := range []*bounded{i.console, i.log} {
		if log != nil {
			errs = append(errs, log.pipe.Close(), log.Close())
		}
	}
	return errors.Join(errs...)
}

// stuckInstance is a VMM that hangs: a command returns when the VMM has ended.
type stuckInstance struct{ *instance }

func (i *stuckInstance) Pause(context.Context) error    { return i.hang() }
func (i *stuckInstance) Resume(context.Context) error   { return i.hang() }
func (i *stuckInstance) Shutdown(context.Context) error { return i.hang() }

func (i *stuckInstance) Kill(context.Context) error {
	i.mu.Lock()
	i.killed = true
	i.mu.Unlock()
	_ = i.child.Signal(unix.SIGKILL)
	<-i.done
	return nil
}

func (i *stuckInstance) hang() error {
	<-i.done
	return errEnded
}

// has reports whether a VM has a fault.
func (t task) has(fault string) bool { return slices.Contains(t.Faults, fault) }
