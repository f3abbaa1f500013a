package namespace_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/namespace/namespacetest"
	"github.com/smolvm/smolvm/internal/proc"
)

// start starts a command with a network, and with the program that is given.
func start(t *testing.T, ctx context.Context, program []string, argv ...string) (*namespace.Process, error) { //nolint:revive // t is first in tests
	t.Helper()
	link, theirs := newLink(t)
	defer func() { _, _ = link.Close(), theirs.Close() }()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Path = argv[0]
	return namespace.Start(ctx, cmd, nil, namespace.Options{Program: program, Network: &namespace.Network{Link: theirs}})
}

// What can't be started is an error that says why, and leaves nothing.
func TestStartFails(t *testing.T) {
	eachUser(t, func(t *testing.T) {
		dir := t.TempDir()
		file := filepath.Join(dir, "file")
		if err := os.WriteFile(file, []byte("no program"), 0o600); err != nil {
			t.Fatal(err)
		}
		before := openFiles(t)
		cancelled, cancel := context.WithCancelCause(t.Context())
		errCancelled := errors.New("nobody wants it any more")
		cancel(errCancelled)
		for name, test := range map[string]struct {
			ctx     context.Context
			program []string
			command string
			is      error
			says    string
		}{
			"no command":         {nil, namespacetest.Program(), filepath.Join(dir, "none"), syscall.ENOENT, "execute it: " + dir},
			"no program":         {nil, namespacetest.Program(), file, syscall.EACCES, "execute it: " + file},
			"no launcher":        {nil, []string{"/bin/true"}, "/bin/true", nil, "is no launcher"},
			"another program":    {nil, []string{"/bin/cat"}, "/bin/true", nil, "is no launcher"},
			"no launcher at all": {nil, []string{filepath.Join(dir, "none")}, "/bin/true", syscall.ENOENT, dir},
			"nobody waits":       {cancelled, []string{"/bin/sleep", "1000"}, "/bin/true", errCancelled, ""},
		} {
			ctx := test.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			process, err := start(t, ctx, test.program, test.command)
			if err == nil {
				t.Errorf("%s: it has started", name)
				_ = process.Kill()
				continue
			}
			if test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: error is %v", name, err)
			}
			hinted, _ := errors.AsType[*smolvm.Error](err)
			if strings.Contains(test.says, "no launcher") && (hinted == nil || !strings.Contains(hinted.Hint, "shim.Main")) {
				t.Errorf("%s: there is no hint beside %v", name, err)
			}
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d files are open, and were %d before", after, before)
		}
	})
}

// openFiles returns how many files this process has open.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// A command that is killed leaves nothing.
func TestKilled(t *testing.T) {
	eachUser(t, func(t *testing.T) {
		before := openFiles(t)
		process, err := start(t, t.Context(), namespacetest.Program(), "/bin/sleep", "1000")
		if err != nil {
			t.Fatal(err)
		}
		id := networkOf(t, process.PID())
		if id == networkOf(t, os.Getpid()) {
			t.Error("it is in this network namespace")
		}
		if err := process.Kill(); err != nil || process.Exit() != "signal: killed" || process.Success() {
			t.Errorf("it has ended with %q, %v", process.Exit(), err)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d files are open, and were %d before", after, before)
		}
		if err := process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("a signal to what is gone: %v", err)
		}
	})
}

// networkOf returns the network namespace of a process.
func networkOf(t *testing.T, pid int) string {
	t.Helper()
	id, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// parent starts a command, prints who it is, and waits to be killed.
func parent() error {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	opts := namespace.Options{Program: namespacetest.Program(), Network: &namespace.Network{Link: os.NewFile(uintptr(ends[0]), "link")}}
	opts.Supervised = len(os.Args) > 2
	process, err := namespace.Start(context.Background(), exec.Command("/bin/sleep", "1000"), nil, opts)
	if err != nil {
		return err
	}
	start, err := proc.StartTime(process.PID())
	if err != nil {
		return err
	}
	fmt.Println(process.PID(), start)
	<-process.Done()
	return errors.New("it has ended")
}

// A command does not outlive the process that has started it, whatever ends that.
func TestParentDeath(t *testing.T) {
	eachUser(t, func(t *testing.T) {
		for _, args := range [][]string{nil, {"supervised"}} {
			if args != nil && os.Getuid() != 0 {
				continue
			}
			cmd := command(parentRole, args...)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(out).ReadString('\n')
			var pid int
			var start uint64
			if _, scanErr := fmt.Sscan(line, &pid, &start); err != nil || scanErr != nil || !proc.Alive(pid, start) {
				t.Fatalf("the parent says %q: %v, %v", line, err, scanErr)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if err := proc.Wait(t.Context(), pid, start); err != nil {
				t.Error(err)
			}
		}
	})
}

// A supervised command tells how it has ended, and takes with it what it has started.
func TestSupervised(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a PID namespace takes root")
	}
	supervise := func(script string) (*namespace.Process, *bufio.Reader) {
		t.Helper()
		out, outWrite, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/bin/sh", "-c", script)
		cmd.Stdout = outWrite
		process, err := namespace.Start(t.Context(), cmd, nil, namespace.Options{Program: namespacetest.Program(), Supervised: true})
		_ = outWrite.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = process.Kill(), out.Close() })
		return process, bufio.NewReader(out)
	}
	for script, want := range map[string]string{"exit 0": "exit status 0", "exit 7": "exit status 7", "kill -9 $$": "signal: killed"} {
		process, _ := supervise(script)
		<-process.Done()
		if process.Exit() != want || process.Success() != (script == "exit 0") {
			t.Errorf("%q has ended with %q", script, process.Exit())
		}
	}
	// The background process has the pipe, and becomes an orphan.
	process, out := supervise("sleep 1000 & echo $$; wait")
	line, err := out.ReadString('\n')
	if err != nil || line == fmt.Sprintln(process.PID()) {
		t.Errorf("it says that it is process %q, %v", line, err)
	}
	// Whoever ends all processes of the host, one after the other, ends the command in order too.
	if err := syscall.Kill(parentOf(t, process.PID()), syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	<-process.Done()
	if _, err := out.ReadByte(); err == nil || process.Exit() != "signal: terminated" {
		t.Errorf("what it has started goes on, or it has ended with %q", process.Exit())
	}
}

// parentOf returns the process id of a process's parent.
func parentOf(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var parent int
	if _, err := fmt.Sscanf(string(text[bytes.LastIndexByte(text, ')')+1:]), " %1s %d", new(string), &parent); err != nil {
		t.Fatal(err)
	}
	return parent
}

// Files are mounted for the command only, with another owner where the file system can do that,
// and as they are where it can't and need not.
func TestMounts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts take root")
	}
	const user = 123456
	dir := t.TempDir()
	private, target, printed := filepath.Join(dir, "private"), filepath.Join(dir, "target"), filepath.Join(dir, "printed")
	for _, path := range []string{private, target} {
		if err := os.WriteFile(path, []byte(filepath.Base(path)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		mount namespace.Mount
		want  string // what the command sees: the owner, then the content, then if it can write
		says  string // or the error
	}{
		{namespace.Mount{Source: private, ReadOnly: true}, "0 private read-only", ""},
		{namespace.Mount{Source: private, ReadOnly: true, User: user}, "123456 private read-only", ""},
		{namespace.Mount{Source: private, User: user}, "123456 private writable", ""},
		{namespace.Mount{Source: "/proc/sys/kernel/ostype", ReadOnly: true, User: user}, "0 Linux read-only", ""}, // of a file system that shows no other owners
		{namespace.Mount{Source: "/proc/vmallocinfo", ReadOnly: true, User: user}, "", "must be readable by everybody"},
		{namespace.Mount{Source: filepath.Join(dir, "none")}, "", "no such file"},
	} {
		out, err := os.Create(printed)
		if err != nil {
			t.Fatal(err)
		}
		test.mount.Target = target
		cmd := exec.Command("/bin/sh", "-c", `echo $(stat -c %u $0) $(cat $0) $(if (: >>$0) 2>/dev/null; then echo writable; else echo read-only; fi)`, target)
		cmd.Stdout, cmd.Stderr = out, os.Stderr
		process, err := namespace.Start(t.Context(), cmd, nil, namespace.Options{
			Program: namespacetest.Program(), Mounts: []namespace.Mount{test.mount},
			Capabilities: []uintptr{unix.CAP_DAC_OVERRIDE},
		})
		if err == nil {
			<-process.Done()
		}
		_ = out.Close()
		text, readErr := os.ReadFile(printed)
		if got := strings.TrimSpace(string(text)); got != test.want || readErr != nil {
			t.Errorf("of %+v the command sees %q, not %q; %v", test.mount, got, test.want, readErr)
		}
		if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("of %+v: error is %v", test.mount, err)
		}
	}
	if text, err := os.ReadFile(target); err != nil || string(text) != "target" {
		t.Errorf("the host sees %q, %v", text, err)
	}
}
