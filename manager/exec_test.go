package manager_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// ask runs a command that must be possible to run.
func ask(t *testing.T, m *manager.Manager, id string, command smolvm.Command) (stdout, stderr string, status smolvm.ExitStatus) {
	t.Helper()
	var out, errs bytes.Buffer
	command.Stdout, command.Stderr = &out, &errs
	status, err := m.Exec(t.Context(), id, command)
	if err != nil {
		t.Errorf("%.100q: %v", command.Args, err)
	}
	return out.String(), errs.String(), status
}

// What a user sees of commands, files and logins in a real guest; one VM serves all of it.
func TestInRealGuest(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	vm := mustRun(t, m, smolvm.VMConfig{})
	t.Run("exec", func(t *testing.T) { execTable(t, m, vm.ID) })
	t.Run("signals", func(t *testing.T) { execSignals(t, m, vm.ID) })
	t.Run("job", func(t *testing.T) { realJob(t, m, vm.ID) })
	t.Run("SSH", func(t *testing.T) { stockSSH(t, m, vm) })
	t.Run("output", func(t *testing.T) { handleOutput(t, m.VM(vm.ID)) })
	t.Run("process", func(t *testing.T) { handleProcess(t, m.VM(vm.ID)) })
	t.Run("files", func(t *testing.T) { handleFiles(t, m.VM(vm.ID)) })
	t.Run("words", func(t *testing.T) { execWords(t, m, vm.ID) })
	t.Run("start", func(t *testing.T) { execStart(t, m, vm.ID) })
	t.Run("end of all", func(t *testing.T) { execEnd(t, m, vm.ID) })
	t.Run("paused", func(t *testing.T) { execPaused(t, m, vm.ID) })
}

// What becomes of a command, a connection and a copy when their guest is paused, ends, or does
// not do its part.
func TestExecInFakeGuest(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	t.Run("dial", func(t *testing.T) { dialDeadlines(t, m, vm.ID) })
	t.Run("paused", func(t *testing.T) { execPaused(t, m, vm.ID) })
	t.Run("files", func(t *testing.T) { copyErrors(t, m, vm.ID) })
	t.Run("end", func(t *testing.T) { execEnds(t, m, vm) })
}

// copyErrors copies what is not there, and to where nothing is.
func copyErrors(t *testing.T, m *manager.Manager, id string) {
	source, result := filepath.Join(t.TempDir(), "source"), filepath.Join(t.TempDir(), "result")
	if err := errors.Join(os.MkdirAll(filepath.Join(source, "deep"), 0o755), os.WriteFile(filepath.Join(source, "deep", "file"), []byte("text"), 0o640)); err != nil {
		t.Fatal(err)
	}
	if err := m.CopyTo(t.Context(), id, source, "/root"); err != nil {
		t.Fatal(err)
	}
	if err := m.CopyFrom(t.Context(), id, "/root/source", result); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(result, "deep", "file")); err != nil || string(got) != "text" {
		t.Errorf("what came back is %q, %v", got, err)
	}
	if err := m.CopyFrom(t.Context(), id, "/no/such", result); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("copy of what is not there: %v", err)
	}
	if err := m.CopyTo(t.Context(), id, source, "/no/such/dir/"); err == nil {
		t.Error("a copy to where nothing is succeeds")
	}
	if err := m.CopyTo(t.Context(), id, filepath.Join(source, "none"), "/root"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("copy of a file that this host has not: %v", err)
	}
	if err := m.CopyTo(t.Context(), "nobody", source, "/root"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("copy to no VM: %v", err)
	}
	brief, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.CopyTo(brief, id, source, "/root"); !errors.Is(err, context.Canceled) {
		t.Errorf("a copy that is given up: %v", err)
	}
}

// execEnds ends the VM in the middle of a command.
func execEnds(t *testing.T, m *manager.Manager, vm smolvm.VMInfo) {
	ready, up := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		_, err := m.Exec(t.Context(), vm.ID, smolvm.Command{Args: []string{"sh", "-c", "echo up; sleep 1000"}, Stdout: up})
		ended <- err
	}()
	if _, err := io.ReadFull(ready, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(vm.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), vm.ID) {
		t.Errorf("a command whose VM ends: %v", err)
	}
	if err := waitEnd(t, vm); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Exec(t.Context(), vm.ID, smolvm.Command{Args: []string{"true"}}); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("a command in a VM that has ended: %v", err)
	}
}

// Words of any length that the kernel takes, and of any bytes, go in as they are (cases 2
// and 4).
func execWords(t *testing.T, m *manager.Manager, id string) {
	long := []string{"sh", "-c", "echo $#", "sh"}
	for i := range 60_000 {
		long = append(long, fmt.Sprintf("file-number-%d", i))
	}
	if out, errs, status := ask(t, m, id, smolvm.Command{Args: long}); out != "60000\n" || !status.Success() {
		t.Errorf("a megabyte of arguments: %q, %q, %v", out, errs, status)
	}
	longer := append(long, strings.Repeat("x", 128<<10))
	if _, errs, status := ask(t, m, id, smolvm.Command{Args: longer}); status.Code != 126 || errs != "smolvm: sh: argument list too long\n" {
		t.Errorf("an argument that is too long: %.200q, %v", errs, status)
	}
	word := "\xff\xe9\x80 \n"
	if out, _, _ := ask(t, m, id, smolvm.Command{Args: []string{"sh", "-c", `printf %s "$1$E"`, "sh", word}, Env: []string{"E=" + word}}); out != word+word {
		t.Errorf("bytes: got %q, want %q twice", out, word)
	}
	var invalid *smolvm.ValidationError
	for _, command := range []smolvm.Command{
		{}, {Args: []string{"a\x00b"}}, {Args: []string{"a"}, Env: []string{"A=\x00"}}, {Args: []string{"a"}, Env: []string{"A"}},
		{Args: []string{"a"}, Dir: "\x00"}, {Args: []string{"a"}, User: "\x00"},
	} {
		if _, err := m.Exec(t.Context(), id, command); !errors.As(err, &invalid) {
			t.Errorf("%+v: %v", command, err)
		}
	}
}

// What keeps a command from being started is said on stderr, with a shell's status.
func execStart(t *testing.T, m *manager.Manager, id string) {
	for name, test := range map[string]struct {
		command smolvm.Command
		code    int
		text    string
	}{
		"no directory":     {smolvm.Command{Args: []string{"true"}, Dir: "/no/such"}, 126, "/no/such: no such directory"},
		"no user":          {smolvm.Command{Args: []string{"true"}, User: "nosuch"}, 126, `no user "nosuch"`},
		"no group":         {smolvm.Command{Args: []string{"true"}, User: "root:nosuch"}, 126, `no group "nosuch"`},
		"no program":       {smolvm.Command{Args: []string{"/etc/passwd"}}, 126, "permission denied"},
		"no interpreter":   {smolvm.Command{Args: []string{"sh", "-c", "printf '#!/no/such\\n' >/tmp/script; chmod +x /tmp/script; exec /tmp/script"}}, 127, ""},
		"closed directory": {smolvm.Command{Args: []string{"true"}, User: "user", Dir: "/root"}, 126, "in /root as user"},
	} {
		if _, errs, status := ask(t, m, id, test.command); status.Code != test.code || !strings.Contains(errs, test.text) {
			t.Errorf("%s: %q, %v", name, errs, status)
		}
	}
	for user, want := range map[string]string{"1234": "1234 0\n", "1000": "1000 1000\n", "user:5": "1000 5\n", "0:tty": "0 5\n"} {
		if out, errs, _ := ask(t, m, id, smolvm.Command{Args: []string{"sh", "-c", "echo $(id -u) $(id -g)"}, User: user}); out != want {
			t.Errorf("as %s: %q, %q, want %q", user, out, errs, want)
		}
	}
}

// A command that is given up takes all that it has started with it, in whatever session;
// one that ends by itself leaves it (M1).
func execEnd(t *testing.T, m *manager.Manager, id string) {
	const list = `ps | grep -c '^ *[0-9]* root  *sleep %[1]d[789]$'`
	const started = `setsid sh -c 'sleep %[1]d7 & sleep %[1]d8' & (setsid setsid sleep %[1]d9 &); while [ $(` + list + `) -lt 3 ]; do sleep 0.1; done; echo up; `
	count := func(n int) string {
		out, _, _ := ask(t, m, id, smolvm.Command{Args: []string{"sh", "-c", fmt.Sprintf(list, n)}})
		return strings.TrimSpace(out)
	}
	if _, errs, status := ask(t, m, id, smolvm.Command{Args: []string{"sh", "-c", fmt.Sprintf(started, 500)}}); !status.Success() {
		t.Errorf("got %v, %q", status, errs)
	}
	if n := count(500); n != "3" {
		t.Errorf("of 3 processes that a command has left %s go on", n)
	}
	ways := map[string]func(cancel func(), signals chan<- smolvm.Signal){
		"cancelled": func(cancel func(), _ chan<- smolvm.Signal) { cancel() },
		"killed":    func(_ func(), signals chan<- smolvm.Signal) { signals <- "KILL" },
	}
	for name, end := range ways {
		ctx, cancel := context.WithCancel(t.Context())
		ready, up := io.Pipe()
		signals := make(chan smolvm.Signal)
		ended := make(chan error, 1)
		go func() {
			_, err := m.Exec(ctx, id, smolvm.Command{Args: []string{"sh", "-c", fmt.Sprintf(started, 600) + "sleep 6007"}, Stdout: up, Signals: signals})
			ended <- err
		}()
		if _, err := io.ReadFull(ready, make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		end(cancel, signals)
		if err := <-ended; (err == nil) != (name == "killed") {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		if n := count(600); n != "0" {
			t.Errorf("%s: %s processes go on", name, n)
		}
	}
	if n := count(500); n != "3" {
		t.Errorf("of another command's 3 processes %s go on", n)
	}
}

// A connection into a guest has deadlines (case 27).
func dialDeadlines(t *testing.T, m *manager.Manager, id string) {
	conn, err := m.Dial(t.Context(), id, "tcp", "127.0.0.1:22")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	text := make([]byte, 4)
	if _, err := io.ReadFull(conn, text); err != nil || string(text) != "SSH-" {
		t.Errorf("got %q, %v", text, err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	_, err = io.Copy(io.Discard, conn)
	var timeout net.Error
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("read after the deadline: %v", err)
	}
}

// A command in a guest that is paused ends with its context, and others go on when the
// guest does (C1, C2).
func execPaused(t *testing.T, m *manager.Manager, id string) {
	input, feed := io.Pipe()
	other := make(chan string, 1)
	ready, up := io.Pipe()
	go func() {
		var out bytes.Buffer
		_, err := m.Exec(t.Context(), id, smolvm.Command{Args: []string{"sh", "-c", "echo up; cat | wc -c"}, Stdin: input, Stdout: io.MultiWriter(&out, up)})
		other <- fmt.Sprint(out.String(), err)
	}()
	if _, err := io.ReadFull(ready, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, ready) }()
	cause := errors.New("given up")
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := make(chan error, 1)
	begun, begin := io.Pipe()
	go func() {
		_, err := m.Exec(ctx, id, smolvm.Command{Args: []string{"sh", "-c", "echo up; sleep 1000"}, Stdout: begin})
		ended <- err
	}()
	if _, err := io.ReadFull(begun, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Pause(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	// More than fits between here and the guest, so that something waits all the time.
	const size = 4 << 20
	go func() {
		_, _ = feed.Write(make([]byte, size))
		_ = feed.Close()
	}()
	began := time.Now()
	cancel(cause)
	if err := <-ended; !errors.Is(err, cause) || time.Since(began) > 10*time.Second {
		t.Errorf("ended after %s with %v", time.Since(began), err)
	}
	if _, err := m.Resume(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if got, want := <-other, fmt.Sprintf("up\n%d\n<nil>", size); got != want {
		t.Errorf("the other command: %q, want %q", got, want)
	}
	if out, _, _ := ask(t, m, id, smolvm.Command{Args: []string{"echo", "on"}}); out != "on\n" {
		t.Errorf("after that: %q", out)
	}
}
