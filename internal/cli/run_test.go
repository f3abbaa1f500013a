package cli_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
)

// host runs the smolvm command with a data directory of its own, which has the
// default image.
type host struct {
	t   *testing.T
	dir string
}

func newHost(t *testing.T) *host {
	t.Helper()
	testenv.RequireQEMU(t)
	h := &host{t, t.TempDir()}
	testenv.SeedImages(t, filepath.Join(h.dir, "data"))
	if err := os.Symlink(testenv.Agent(t), filepath.Join(h.dir, "smolvm-agent")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left := h.output("rm", "--all"); left != "" {
			t.Errorf("left behind: VMs %s", left)
		}
		for _, pattern := range []string{"data/vms/*", "data/disks/*", "data/locks/*", "smolvm/*"} {
			paths, _ := filepath.Glob(filepath.Join(h.dir, pattern))
			for _, path := range paths {
				t.Errorf("left behind: %s", path)
			}
		}
	})
	return h
}

func (h *host) command(args ...string) *exec.Cmd {
	cmd := exec.Command("smolvm", args...)
	cmd.Env = append(os.Environ(),
		"SMOLVM_DATA_DIR="+filepath.Join(h.dir, "data"),
		"SMOLVM_TEMPLATES=off",
		"XDG_RUNTIME_DIR="+h.dir,
		"PATH="+h.dir+string(filepath.ListSeparator)+os.Getenv("PATH"))
	return cmd
}

func (h *host) output(args ...string) string {
	h.t.Helper()
	out, err := h.command(args...).Output()
	if err != nil {
		h.t.Errorf("smolvm %s: %v", strings.Join(args, " "), err)
	}
	return string(out)
}

// However a run is interrupted, nothing of it is left.
func TestRunInterrupted(t *testing.T) {
	t.Parallel()
	tests := []struct {
		signal unix.Signal
		trap   string // what the command does with the signal
		want   int
	}{
		{unix.SIGINT, "", 130},
		{unix.SIGTERM, "trap 'exit 9' TERM;", 9},
		{unix.SIGKILL, "", -1}, // ended by the signal itself
	}
	for _, test := range tests {
		t.Run(unix.SignalName(test.signal), func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			cmd := h.command("run", "--", "sh", "-c", test.trap+"echo ready; while :; do sleep 0.1; done")
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
				t.Errorf("command printed %q (%v)", line, err)
			}
			shim := h.shimOf(t)
			if err := cmd.Process.Signal(test.signal); err != nil {
				t.Error(err)
			}
			err = cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != test.want {
				t.Errorf("smolvm run ended with %v, want status %d", err, test.want)
			}
			awaitEnd(t, shim)
		})
	}
}

// A command that ends with its VM's time to live is told so (A6).
func TestRunTTL(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	cmd := h.command("run", "--ttl", "5s", "--", "sleep", "1000")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 143 || !strings.Contains(stderr.String(), "time to live of 5s is over") {
		t.Errorf("got %v, %q", err, stderr.String())
	}
}

// shimOf opens the shim of the only VM that runs.
func (h *host) shimOf(t *testing.T) (pidfd int) {
	t.Helper()
	var vms []smolvm.VMInfo
	if err := json.Unmarshal([]byte(h.output("ls", "--json", "--state", "running")), &vms); err != nil {
		t.Fatal(err)
	}
	if len(vms) != 1 {
		t.Fatalf("%d VMs run, want 1", len(vms))
	}
	pidfd, err := unix.PidfdOpen(vms[0].ShimPID, 0)
	if err != nil {
		t.Fatal(err)
	}
	return pidfd
}

// awaitEnd waits until a process has ended.
func awaitEnd(t *testing.T, pidfd int) {
	t.Helper()
	defer func() { _ = unix.Close(pidfd) }()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(time.Minute/time.Millisecond))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil || n == 0:
			t.Fatalf("the shim did not end within a minute: %v", err)
		default:
			return
		}
	}
}

// A terminal is handed to the command with its size and all its keys, and is given
// back as it was.
func TestTerminal(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.output("create", "--name", "web")
	h.output("start", "web")
	defer h.output("rm", "web")

	master, terminal, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(master.Close(), terminal.Close()) }()
	before, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if err := pty.Setsize(master, &pty.Winsize{Cols: 101, Rows: 31}); err != nil {
		t.Fatal(err)
	}
	// A session of its own, as a terminal's signals go to the processes of one.
	cmd := h.command("shell", "web")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// With nobody left at the terminal, reading from it ends.
	watchdog := time.AfterFunc(time.Minute, func() { _ = errors.Join(cmd.Process.Kill(), terminal.Close()) })
	defer watchdog.Stop()
	screen := bufio.NewReader(master)
	// What is typed is echoed too, so what is looked for must not be what is typed.
	dialogue := func(line, want string) {
		t.Helper()
		if _, err := io.WriteString(master, line+"\n"); err != nil {
			t.Fatal(err)
		}
		for {
			text, err := screen.ReadString('\n')
			if err != nil {
				t.Fatalf("%q is missing: %v", want, err)
			}
			if strings.Contains(text, want) {
				return
			}
		}
	}
	dialogue("echo size $(stty size)", "size 31 101")
	if err := pty.Setsize(master, &pty.Winsize{Cols: 77, Rows: 22}); err != nil {
		t.Fatal(err)
	}
	dialogue(`until [ "$(stty size)" = "22 77" ]; do sleep 0.1; done; echo changed $((1+1))`, "changed 2")
	// Ctrl-C ends what runs in the guest, and not us.
	dialogue("sleep 1000 & echo waiting $((2+2)); wait; echo no", "waiting 4")
	dialogue("\x03echo still $((3+3))", "still 6")
	if _, err := io.WriteString(master, "exit 3\n"); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("shell ended with %v, want status 3", err)
	}
	after, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("terminal was changed:\nbefore %v\nafter  %v", before, after)
	}
}
