package shim_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
)

// A start that fails says why, and leaves nothing; see cleanup.
func TestLaunchFails(t *testing.T) {
	t.Parallel()
	prerequisite := func(err error) bool {
		missing, ok := errors.AsType[*smolvm.PrerequisiteError](err)
		return ok && missing.Backend == "fake" && len(missing.Findings) == 1
	}
	timeout := func(err error) bool { return errors.Is(err, smolvm.ErrBootTimeout) }
	for name, test := range map[string]struct {
		args   string
		change func(*shim.LaunchOptions)
		text   string // in the error
		is     func(error) bool
	}{
		"no answer": {change: func(o *shim.LaunchOptions) { o.Spec.ReadyTimeout = time.Second },
			text: "the console ends with: " + consoleText, is: timeout},
		"no SSH": {args: hasAgent, change: func(o *shim.LaunchOptions) {
			o.Spec.ReadyTimeout, o.Spec.Ready, o.Spec.Network = time.Second, smolvm.ReadySSH, testNetwork()
		}, text: `(by "ssh")`, is: timeout},
		"SSH without a network": {args: hasAgent, change: func(o *shim.LaunchOptions) { o.Spec.Ready = smolvm.ReadySSH },
			text: "without a network"},
		"VMM ends":       {args: dies, text: "exit status 1; the console ends with: " + consoleText},
		"VMM missing":    {args: missing, text: "start fake: backend fake can't run on this host", is: prerequisite},
		"other backend":  {change: func(o *shim.LaunchOptions) { o.Spec.Backend = "other" }, text: `"other" is not part`},
		"agent expected": {change: func(o *shim.LaunchOptions) { o.Spec.Hello = nil }, text: "without an agent"},
		"newer orders": {change: func(o *shim.LaunchOptions) { o.Spec.Protocol = shim.OrderProtocol + 1 },
			text: "knows formats up to"},
		"other network mode": {change: func(o *shim.LaunchOptions) {
			o.Spec.Network = testNetwork()
			o.Spec.Network.Mode = "carrier-pigeon"
		}, text: `network mode "carrier-pigeon" is not known`, is: func(err error) bool { return errors.Is(err, smolvm.ErrUnsupported) && smolvm.HintOf(err) != "" }},
		"no directory": {change: func(o *shim.LaunchOptions) { o.Spec.RuntimeDir = "/dev/null/vm" }, text: "/dev/null"},
		"no program":   {change: func(o *shim.LaunchOptions) { o.Program = nil }, text: "no program"},
		"program that is not there": {change: func(o *shim.LaunchOptions) { o.Program = []string{"/nonexistent/shim"} },
			text: "/nonexistent/shim"},
		"program that is no shim": {change: func(o *shim.LaunchOptions) {
			o.Program = []string{"/bin/sh", "-c", "echo this is no shim; echo; exit 3"}
		}, text: "its log says: this is no shim", is: isHinted},
		"program that says nothing": {change: func(o *shim.LaunchOptions) {
			o.Program = []string{"/bin/sh", "-c", "cat > /dev/null"}
			o.Spec.ReadyTimeout, o.AnswerTime = 0, 100*time.Millisecond
		}, text: "did not answer as a shim within 100ms; its log is empty", is: isHinted},
		"program that reads nothing": {change: func(o *shim.LaunchOptions) {
			o.Program = []string{"tail", "-f", "/dev/null"}
			o.Spec.VMM.BootArgs = strings.Repeat("more than a pipe holds ", 1<<13)
			o.Spec.ReadyTimeout, o.AnswerTime = 0, 100*time.Millisecond
		}, text: "did not answer as a shim within 100ms", is: isHinted},
		"endless time": {args: dies, change: func(o *shim.LaunchOptions) { o.Spec.ReadyTimeout = math.MaxInt64 },
			text: "exit status 1"},
		"forwards without a network": {args: hasAgent, change: func(o *shim.LaunchOptions) {
			o.Listeners = []io.Closer{listen(t)}
			o.Spec.Forwards = []shim.Forward{{GuestPort: 80}}
		}, text: "port forwards"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, test.args)
			// Earlier runs have left words of their own.
			for _, path := range []string{f.opts.LogPath, f.opts.Spec.VMM.ConsolePath} {
				if err := os.WriteFile(path, []byte("words of old\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if test.change != nil {
				test.change(&f.opts)
			}
			launched, err := shim.Launch(t.Context(), f.opts)
			if err == nil {
				launched.Abort(t.Context())
				t.Fatal("Launch succeeds")
			}
			if !strings.Contains(err.Error(), test.text) || strings.Contains(err.Error(), "words of old") {
				t.Errorf("error is %q, want %q in it", err, test.text)
			}
			if test.is != nil && !test.is(err) {
				t.Errorf("error %q (%T) is of another kind", err, err)
			}
			if left := testenv.Processes(f.opts.Spec.ID); len(left) > 0 {
				t.Errorf("when Launch has returned there are processes: %q", left)
			}
		})
	}
}

// isHinted reports whether an error says what is to be done about a program that is no shim.
func isHinted(err error) bool { return strings.Contains(smolvm.HintOf(err), "shim.Main") }

// A program that is no shim freezes nothing, and is not waited for without end.
func TestFreezeBySilentProgram(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.opts.Program = []string{"/bin/sh", "-c", "cat > /dev/null"}
	f.opts.Spec.ReadyTimeout, f.opts.AnswerTime = 0, 100*time.Millisecond
	f.opts.Spec.Freeze = &shim.FreezeOrder{}
	if err := shim.Freeze(t.Context(), f.opts); !isHinted(err) {
		t.Errorf("Freeze: %v", err)
	}
	if left := testenv.Processes(f.opts.Spec.ID); len(left) > 0 {
		t.Errorf("when Freeze has returned there are processes: %q", left)
	}
}

// A shim that hangs where it stands by, before it takes a claim or after, is not waited for
// without end.
func TestClaimOfHungShim(t *testing.T) {
	t.Parallel()
	for name, accept := range map[string]bool{"takes nothing": false, "reports nothing": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			listener, err := stream.ListenUnix(shim.ClaimSocket(dir))
			if err != nil {
				t.Fatal(err)
			}
			over, ended := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(ended)
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				defer func() { _ = conn.Close() }()
				if unixConn, ok := conn.(*net.UnixConn); ok && accept {
					for _, file := range takeClaim(t, unixConn) {
						defer func() { _ = file.Close() }()
					}
				}
				<-over
			}()
			defer func() {
				close(over)
				_ = listener.Close()
				<-ended
			}()
			lock, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = lock.Close() }()
			f := newFixture(t)
			f.opts.Spec.ReadyTimeout, f.opts.AnswerTime = 0, 100*time.Millisecond
			if !accept {
				f.opts.Spec.VMM.BootArgs = strings.Repeat("more than a socket holds ", 1<<16)
			}
			_, err = shim.Claim(t.Context(), shim.Slot{StandbyDir: dir, Dir: dir, Lock: lock}, f.opts)
			if err == nil || !strings.Contains(err.Error(), "did not answer within 100ms") {
				t.Errorf("Claim: %v", err)
			}
		})
	}
}

// takeClaim reads a claim, and returns the files that come with it.
func takeClaim(t *testing.T, conn *net.UnixConn) []*os.File {
	rights := make([]byte, unix.CmsgSpace(4*8))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 64<<10), rights)
	if err != nil {
		t.Error(err)
		return nil
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil {
		t.Error(err)
	}
	var files []*os.File
	for _, message := range messages {
		fds, err := unix.ParseUnixRights(&message)
		if err != nil {
			t.Error(err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "claimed"))
		}
	}
	return files
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return listener
}

func testNetwork() *network.Config {
	return &network.Config{
		Prefix:   netip.MustParsePrefix("10.0.2.0/24"),
		Gateway:  netip.MustParseAddr("10.0.2.2"),
		Guest:    netip.MustParseAddr("10.0.2.15"),
		GuestMAC: "02:00:ac:10:00:02",
	}
}

// An order is sent with the lowest number with which no shim misunderstands it, so that an
// older shim does what it can do, and refuses what it would do in another way.
func TestOrderNumber(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		network *network.Config
		want    int
	}{
		"no network":                      {nil, shim.Protocol},
		"mode of before there were modes": {&network.Config{}, shim.Protocol},
		"user":                            {&network.Config{Mode: smolvm.NetworkUser}, shim.Protocol},
		"TAP":                             {&network.Config{Mode: network.TAP}, 2},
		"policy":                          {&network.Config{Egress: &network.Egress{}}, 3},
		"TAP and policy":                  {&network.Config{Mode: network.TAP, Egress: &network.Egress{}}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			order := filepath.Join(t.TempDir(), "order")
			f.opts.Spec.Network = test.network
			f.opts.Program = []string{"/bin/sh", "-c", "head -n 1 >" + order}
			if launched, err := shim.Launch(t.Context(), f.opts); err == nil {
				launched.Abort(t.Context())
				t.Fatal("Launch succeeds by a program that is no shim")
			}
			text, err := os.ReadFile(order)
			var sent shim.Spec
			if err == nil {
				err = json.Unmarshal(text, &sent)
			}
			if err != nil || sent.Protocol != test.want {
				t.Errorf("the order is number %d (%v), want %d: %s", sent.Protocol, err, test.want, text)
			}
		})
	}
}

func TestLaunchCancelled(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	reason := errors.New("changed my mind")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		f.awaitConsole()
		cancel(reason)
	}()
	if _, err := shim.Launch(ctx, f.opts); !errors.Is(err, reason) {
		t.Errorf("Launch: %v, want %v", err, reason)
	}
	if record := f.record(); record.Committed {
		t.Errorf("exit record is %+v", record)
	}
}

// awaitConsole waits until the guest has said something.
func (f *fixture) awaitConsole() { f.awaitConsoleText("") }

// awaitConsoleText waits until the guest has said something with a text in it.
func (f *fixture) awaitConsoleText(text string) {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if said, err := os.ReadFile(f.opts.Spec.VMM.ConsolePath); err == nil && len(said) > 0 && strings.Contains(string(said), text) {
			return
		}
	}
	f.Errorf("the guest does not say %q", text)
}

// Until the commit, giving up is all it takes to undo the start.
func TestAbort(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	launched, err := shim.Launch(t.Context(), f.opts)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		launched.Abort(t.Context())
	}
	record := f.end(launched)
	if record.Committed || record.Exit.Reason != vmm.ExitKilled || !strings.Contains(record.Exit.Detail, "given up") {
		t.Errorf("exit record is %+v", record)
	}
	if err := launched.Commit(); err == nil {
		t.Error("Commit succeeds after Abort")
	}
}

// A shim that does not react is killed, and its VMM with it.
func TestAbortHungShim(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	launched, err := shim.Launch(t.Context(), f.opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(launched.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	launched.Abort(ctx)
	if err := proc.Wait(t.Context(), launched.VMMPID, launched.VMMStart); err != nil {
		t.Error(err)
	}
	if err := os.RemoveAll(f.opts.Spec.RuntimeDir); err != nil { // nobody was there to do it
		t.Error(err)
	}
}

// A VM that ends before the commit makes the commit fail, with the reason.
func TestEndsBeforeCommit(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	launched, err := shim.Launch(t.Context(), f.opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := proc.Kill(t.Context(), launched.VMMPID, launched.VMMStart); err != nil {
		t.Fatal(err)
	}
	record := f.end(launched)
	if record.Committed || record.Exit.Reason != vmm.ExitCrashed {
		t.Errorf("exit record is %+v", record)
	}
	if err := launched.Commit(); err == nil || !strings.Contains(err.Error(), "ended unexpectedly") {
		t.Errorf("Commit: %v", err)
	}
	launched.Abort(t.Context())
}

// launcher starts a process that launches the VM, and returns when it has come so far.
func (f *fixture) launcher(commit bool, until string, files ...*os.File) *exec.Cmd {
	f.Helper()
	orders, err := json.Marshal(map[string]any{"Options": f.opts, "Commit": commit})
	if err != nil {
		f.Fatal(err)
	}
	cmd := exec.Command(f.opts.Program[0], launcherRole)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = files
	stdin, stdinErr := cmd.StdinPipe()
	stdout, stdoutErr := cmd.StdoutPipe()
	if err := errors.Join(stdinErr, stdoutErr, cmd.Start()); err != nil {
		f.Fatal(err)
	}
	if _, err := stdin.Write(append(orders, '\n')); err != nil {
		f.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if lines.Text() == until {
			return cmd
		}
	}
	f.Fatalf("launcher has ended without a word of %q", until)
	return nil
}

func (f *fixture) killLauncher(cmd *exec.Cmd) {
	f.Helper()
	if err := cmd.Process.Kill(); err != nil {
		f.Fatal(err)
	}
	_ = cmd.Wait()
}

// gone waits until no process of the VM is left.
func (f *fixture) gone() {
	f.Helper()
	for deadline := time.Now().Add(patience); len(testenv.Processes(f.opts.Spec.ID)) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			f.Fatalf("processes do not end: %q", testenv.Processes(f.opts.Spec.ID))
		}
	}
}

// A launcher that is killed takes the VM along, until the commit and, if the VM is
// ephemeral, after it.
func TestLauncherKilled(t *testing.T) {
	t.Parallel()
	t.Run("while booting", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		launcher := f.launcher(false, "launching")
		f.awaitConsole()
		f.killLauncher(launcher)
		f.gone()
		if f.record().Committed {
			t.Error("the start is recorded as committed")
		}
	})
	t.Run("before commit", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t, hasAgent)
		f.killLauncher(f.launcher(false, "launched"))
		f.gone()
		if f.record().Committed {
			t.Error("the start is recorded as committed")
		}
	})
	t.Run("ephemeral", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t, hasAgent)
		f.opts.Spec.Ephemeral = true
		f.killLauncher(f.launcher(true, "launched"))
		f.gone()
		if record := f.record(); !record.Committed || !strings.Contains(record.Exit.Detail, "belongs to ended") {
			t.Errorf("exit record is %+v", record)
		}
	})
	t.Run("after commit", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t, hasAgent)
		f.killLauncher(f.launcher(true, "launched"))
		if _, err := f.client().Status(t.Context()); err != nil {
			t.Errorf("status: %v", err)
		}
		f.stop(patience)
		f.gone()
		if record := f.record(); !record.Committed || record.Exit.Reason != vmm.ExitPowerOff {
			t.Errorf("exit record is %+v", record)
		}
	})
}

// A shim does not hold what its launcher has inherited: somebody may wait for its end.
func TestInheritedFiles(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	f.opts.Spec.Ephemeral = false
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	launcher := f.launcher(true, "launched", writer, writer, writer, writer, writer)
	_ = writer.Close()
	f.killLauncher(launcher)
	if err := reader.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the pipe is still held: %v", err)
	}
	f.stop(0)
	f.gone()
}
