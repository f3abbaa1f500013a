package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"sync"

	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/vmm"
)

// instance implements [vmm.Instance].
type instance struct {
	cfg     vmm.Config
	child   *proc.Child
	control net.Conn
	channel net.Conn
	qmp     *qmp
	// Lengths that the log and the console had when the VM started: what is older
	// is of earlier runs.
	logStart, consoleStart int64

	mu       sync.Mutex // guards the following
	shutdown string     // the reason that QEMU gave for its end
	killed   bool       // Kill was called before QEMU gave any

	done chan struct{}
	exit vmm.Exit // written before done is closed
}

var (
	_ vmm.Instance = (*instance)(nil)
	_ vmm.Pauser   = (*instance)(nil)
)

// PID implements [vmm.Instance].
func (i *instance) PID() int { return i.child.PID() }

// Channel implements [vmm.Instance].
func (i *instance) Channel() io.ReadWriteCloser {
	if i.channel == nil {
		return nil
	}
	return i.channel
}

// Done implements [vmm.Instance].
func (i *instance) Done() <-chan struct{} { return i.done }

// Exit implements [vmm.Instance].
func (i *instance) Exit() vmm.Exit { return i.exit }

// Shutdown implements [vmm.Instance].
func (i *instance) Shutdown(ctx context.Context) error {
	return i.unlessGone(i.qmp.execute(ctx, "system_powerdown", nil))
}

// Pause implements [vmm.Pauser].
func (i *instance) Pause(ctx context.Context) error { return i.qmp.execute(ctx, "stop", nil) }

// Resume implements [vmm.Pauser].
func (i *instance) Resume(ctx context.Context) error { return i.qmp.execute(ctx, "cont", nil) }

// Kill implements [vmm.Instance].
func (i *instance) Kill(ctx context.Context) error {
	i.mu.Lock()
	i.killed = i.killed || i.shutdown == ""
	i.mu.Unlock()
	// Asked to quit, QEMU writes out what the guest has written to its disks.
	if err := i.unlessGone(i.qmp.execute(ctx, "quit", nil)); err == nil {
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

// unlessGone makes a success of a command to a QEMU that has ended.
func (i *instance) unlessGone(err error) error {
	if errors.Is(err, errQMPClosed) {
		return nil
	}
	return err
}

// handle notes the events that say why QEMU ends.
func (i *instance) handle(e event) {
	if e.Name != "SHUTDOWN" && e.Name != "GUEST_PANICKED" {
		return
	}
	reason := "guest-panic"
	if e.Name == "SHUTDOWN" {
		var data struct {
			Reason string `json:"reason"`
		}
		if json.Unmarshal(e.Data, &data) != nil {
			return
		}
		reason = data.Reason
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.shutdown == "" {
		i.shutdown = reason
	}
}

// watch waits for QEMU's end and finds out why it came.
func (i *instance) watch() {
	<-i.child.Done()
	<-i.qmp.done // all events have been handled then
	i.exit = i.classify()
	_ = i.closeConns()
	close(i.done)
}

func (i *instance) closeConns() error {
	errs := []error{i.control.Close()}
	if i.channel != nil {
		errs = append(errs, i.channel.Close())
	}
	return errors.Join(errs...)
}

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
		if line := panicLine(since(i.cfg.ConsolePath, i.consoleStart)); line != "" || i.shutdown == "guest-panic" {
			exit.Reason, exit.Detail = vmm.ExitPanic, line
		}
	default:
		exit.Reason = vmm.ExitCrashed
		exit.Detail = "QEMU: " + i.child.Exit()
		if words := lastLines(since(i.cfg.LogPath, i.logStart), 5); words != "" {
			exit.Detail += ": " + words
		}
	}
	return exit
}

// panicLine finds the kernel's message of its panic.
func panicLine(console string) string {
	const mark = "Kernel panic - not syncing: "
	_, message, found := strings.Cut(console, mark)
	if !found {
		return ""
	}
	message, _, _ = strings.Cut(message, "\n")
	return strings.TrimSpace(message)
}
