package guest

import (
	"os"
	"os/signal"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// What a process takes is seen by its masks in /proc.
func TestTakesSignal(t *testing.T) {
	for name, test := range map[string]struct {
		status string
		want   bool
	}{
		"nothing":        {"SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nSigCgt:\t0000000000000000\n", false},
		"has a handler":  {"SigBlk:\t0000000000000000\nSigCgt:\t0000002000000000\n", true},
		"blocks it":      {"SigBlk:\t7fe3c0fe28014a03\nSigIgn:\t0000000000001000\nSigCgt:\t00000001800004ec\n", true}, // systemd
		"ignores it":     {"SigBlk:\t0000000000000000\nSigIgn:\t0000002000000000\nSigCgt:\t0000000000000000\n", false},
		"pending only":   {"ShdPnd:\t0000002000000000\nSigBlk:\t0000000000000000\n", false},
		"another signal": {"SigCgt:\t0000001000000000\n", false},
		"no mask":        {"SigCgt:\tx\n", false},
		"empty":          {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "status")
			if err := os.WriteFile(path, []byte(test.status), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := takesSignal(path, systemdPowerOff); got != test.want {
				t.Errorf("it is taken: %v, want %v", got, test.want)
			}
		})
	}
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, unix.SIGUSR2)
	defer signal.Stop(caught)
	if !takesSignal("/proc/self/status", unix.SIGUSR2) {
		t.Error("this program does not take a signal that it has asked for")
	}
	if takesSignal("/proc/self/status", unix.SIGKILL) {
		t.Error("this program takes SIGKILL")
	}
}
