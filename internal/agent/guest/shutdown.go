package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/agent/wire"
)

// systemdPowerOff is SIGRTMIN+4, by which systemd(1) is told to power off.
const systemdPowerOff = unix.Signal(34 + 4)

// watchSignals shuts down as the signals that programs send to PID 1 ask for:
// busybox's poweroff and halt send USR2 and USR1, its reboot TERM, the kernel on
// Ctrl-Alt-Del INT, power daemons PWR.
func (a *agent) watchSignals() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPWR, systemdPowerOff)
	switch <-signals {
	case unix.SIGTERM, unix.SIGINT:
		a.end(wire.Shutdown{Grace: defaultGrace}, unix.LINUX_REBOOT_CMD_RESTART)
	default:
		a.end(wire.Shutdown{Grace: defaultGrace}, unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
}

// defaultGrace is how long processes get when nobody says.
const defaultGrace = 5 * time.Second

func (a *agent) powerOff(shutdown wire.Shutdown) { a.end(shutdown, unix.LINUX_REBOOT_CMD_POWER_OFF) }

// end ends all processes, writes out the disks, and powers off or resets.
func (a *agent) end(shutdown wire.Shutdown, command int) {
	// HUP for shells, which ignore TERM; CONT for those that are stopped. A program that
	// wants another signal than TERM may do something else on these, and gets that one only.
	signals := []unix.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGCONT}
	if shutdown.Signal != 0 {
		signals = []unix.Signal{unix.Signal(shutdown.Signal), unix.SIGCONT}
	}
	for _, sig := range signals {
		_ = unix.Kill(-1, sig)
	}
	idle := make(chan struct{})
	go func() {
		a.reaper.waitIdle()
		close(idle)
	}()
	select {
	case <-idle:
	case <-time.After(shutdown.Grace):
		_ = unix.Kill(-1, unix.SIGKILL)
	}
	unix.Sync()
	_ = a.mounts.drop()
	// So that the file system is clean. It fails while something is still open for
	// writing; the journal then does its work at the next mount.
	_ = unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	_ = unix.Reboot(command)
}

// initEvery is how often it is looked whether an init takes signals already: nothing tells of that.
const initEvery = 50 * time.Millisecond

// shutdownBesideInit asks the image's own init to power off, in the way it knows.
func shutdownBesideInit(shutdown wire.Shutdown) {
	// Who is killed as it takes too long has at least what was written before.
	unix.Sync()
	ctx, cancel := context.WithTimeout(context.Background(), shutdown.Grace)
	defer cancel()
	if askInit(ctx) == nil {
		return
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// askInit asks the init to power off. It fails if there is no way that we know, and when ctx ends
// before it could be asked.
func askInit(ctx context.Context) error {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	again := time.NewTicker(initEvery)
	defer again.Stop()
	for {
		init, err := os.Readlink("/proc/1/exe")
		if err != nil {
			return err
		}
		name := filepath.Base(init)
		ask := powerOffSignal(name)
		switch {
		case init == self: // PID 1 is the agent that hands over to the init
		case asksByProgram(name):
			return exec.CommandContext(ctx, "/sbin/poweroff").Run()
		case ask == 0:
			return fmt.Errorf("init %s is none that is known", init)
		case takesSignal("/proc/1/status", ask): // the kernel drops what is sent to PID 1 before that
			return unix.Kill(1, ask)
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// powerOffSignal returns the signal by which an init of that name is told to power off; 0: by none that
// we know.
func powerOffSignal(name string) unix.Signal {
	switch {
	case strings.HasPrefix(name, "systemd"):
		return systemdPowerOff
	case strings.HasPrefix(name, "busybox"):
		return unix.SIGUSR2
	}
	return 0
}

// asksByProgram reports whether an init of that name, sysvinit's first, is told to power off by a program
// that comes with it.
func asksByProgram(name string) bool {
	switch name {
	case "init", "openrc-init", "runit", "runit-init", "dinit", "s6-svscan":
		return true
	}
	return false
}

// takesSignal reports whether a process, by its status in /proc, has a handler for a signal, or
// blocks it, as one does that reads signals from a file.
func takesSignal(status string, sig unix.Signal) bool {
	text, err := os.ReadFile(status)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "SigBlk" && name != "SigCgt" {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err == nil && mask>>(uint(sig)-1)&1 != 0 {
			return true
		}
	}
	return false
}
