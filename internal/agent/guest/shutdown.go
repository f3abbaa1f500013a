package guest

import (
	"os"
	"os/signal"
	"path/filepath"
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

// shutdownBesideInit asks the image's own init to power off, in the way it knows.
func shutdownBesideInit(wire.Shutdown) {
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		_ = unix.Kill(1, systemdPowerOff)
		return
	}
	if init, err := os.Readlink("/proc/1/exe"); err == nil && strings.Contains(filepath.Base(init), "busybox") {
		_ = unix.Kill(1, unix.SIGUSR2)
		return
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
