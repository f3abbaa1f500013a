package manager_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

func hostAddr(f smolvm.PortForward) string {
	return net.JoinHostPort(f.HostAddr.String(), strconv.Itoa(f.HostPort))
}

func dialTCP(t *testing.T, f smolvm.PortForward) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", hostAddr(f))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// get asks an HTTP server on conn for its page.
func get(t *testing.T, conn net.Conn) string {
	t.Helper()
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// execTable runs a command in each of the ways.
func execTable(t *testing.T, m *manager.Manager, id string) {
	tests := map[string]struct {
		command        smolvm.Command
		status         smolvm.ExitStatus
		stdout, stderr string
	}{
		"apart":       {smolvm.Command{Args: []string{"sh", "-c", "echo out; echo err >&2"}}, smolvm.ExitStatus{}, "out\n", "err\n"},
		"status":      {smolvm.Command{Args: []string{"sh", "-c", "exit 42"}}, smolvm.ExitStatus{Code: 42}, "", ""},
		"signal":      {smolvm.Command{Args: []string{"sh", "-c", "kill -TERM $$"}}, smolvm.ExitStatus{Code: 143, Signal: "TERM"}, "", ""},
		"not found":   {smolvm.Command{Args: []string{"no-such"}}, smolvm.ExitStatus{Code: 127}, "", "smolvm: no-such: command not found\n"},
		"stdin":       {smolvm.Command{Args: []string{"tr", "a-z", "A-Z"}, Stdin: strings.NewReader("shout")}, smolvm.ExitStatus{}, "SHOUT", ""},
		"environment": {smolvm.Command{Args: []string{"sh", "-c", "echo $A"}, Env: []string{"A=1", "A=2"}}, smolvm.ExitStatus{}, "2\n", ""},
		"directory":   {smolvm.Command{Args: []string{"pwd"}, Dir: "/usr"}, smolvm.ExitStatus{}, "/usr\n", ""},
		"home":        {smolvm.Command{Args: []string{"pwd"}}, smolvm.ExitStatus{}, "/root\n", ""},
		"user":        {smolvm.Command{Args: []string{"sh", "-c", "id -un; id -u; pwd"}, User: "user"}, smolvm.ExitStatus{}, "user\n1000\n/home/user\n", ""},
		"terminal":    {smolvm.Command{Args: []string{"stty", "size"}, TTY: &smolvm.TTY{Size: smolvm.WindowSize{Columns: 99, Rows: 33}}}, smolvm.ExitStatus{}, "33 99\r\n", ""},
		"exact words": {smolvm.Command{Args: []string{"printf", "%s|", "a b", "$x", "'"}}, smolvm.ExitStatus{}, "a b|$x|'|", ""},
		"timers":      {smolvm.Command{Args: []string{"cat", "/proc/self/timerslack_ns"}}, smolvm.ExitStatus{}, "50000\n", ""},
		"orphans":     {smolvm.Command{Args: []string{"sh", "-c", "sleep 100 & echo left"}}, smolvm.ExitStatus{}, "left\n", ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr bytes.Buffer
			test.command.Stdout, test.command.Stderr = &stdout, &stderr
			status, err := m.Exec(t.Context(), id, test.command)
			if err != nil || status != test.status || stdout.String() != test.stdout || stderr.String() != test.stderr {
				t.Errorf("got %v, %v, stdout %q, stderr %q", status, err, stdout.String(), stderr.String())
			}
		})
	}
	var invalid *smolvm.ValidationError
	if _, err := m.Exec(t.Context(), id, smolvm.Command{}); !errors.As(err, &invalid) {
		t.Errorf("exec of nothing: %v", err)
	}
}

// execSignals sends a signal to a command that handles it.
func execSignals(t *testing.T, m *manager.Manager, id string) {
	signals := make(chan smolvm.Signal)
	ready, write := io.Pipe()
	go func() {
		_, _ = ready.Read(make([]byte, 1))
		signals <- "INT"
		_, _ = io.Copy(io.Discard, ready)
	}()
	status, err := m.Exec(t.Context(), id, smolvm.Command{
		Args:    []string{"sh", "-c", "trap 'exit 7' INT; echo ready; while :; do sleep 0.1; done"},
		Stdout:  write,
		Signals: signals,
	})
	if err != nil || status.Code != 7 {
		t.Errorf("got %v, %v", status, err)
	}
}

// realJob brings a source tree in, runs a pipeline over it, and gets the result out.
func realJob(t *testing.T, m *manager.Manager, id string) {
	source := filepath.Join(t.TempDir(), "project")
	files := map[string]string{"main.go": "package main\n\nfunc main() {}\n", "lib/a.go": "package lib\n", "lib/deep/b.go": "package deep\n\nvar x = 1\n"}
	for name, text := range files {
		path := filepath.Join(source, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("lib/a.go", filepath.Join(source, "link")); err != nil {
		t.Fatal(err)
	}
	if err := m.CopyTo(t.Context(), id, source, "/root"); err != nil {
		t.Fatal(err)
	}
	sh(t, m, id, "cd /root/project && find . -name '*.go' | sort | xargs cat | wc -l > lines && cp -a lib out && chmod 700 out")
	result := filepath.Join(t.TempDir(), "result")
	if err := m.CopyFrom(t.Context(), id, "/root/project", result); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"lines": "7\n", "main.go": files["main.go"], "out/deep/b.go": files["lib/deep/b.go"], "link": files["lib/a.go"]} {
		got, err := os.ReadFile(filepath.Join(result, name))
		if err != nil || string(got) != want {
			t.Errorf("%s is %q (%v), want %q", name, got, err, want)
		}
	}
	for name, want := range map[string]os.FileMode{"main.go": 0o640, "out": os.ModeDir | 0o700} {
		if info, err := os.Stat(filepath.Join(result, name)); err != nil || info.Mode() != want {
			t.Errorf("mode of %s is %v (%v), want %v", name, info.Mode(), err, want)
		}
	}
	if err := m.CopyFrom(t.Context(), id, "/no/such", result); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("copy of what is not there: %v", err)
	}
	if err := m.CopyTo(t.Context(), id, source, "/no/such/dir/"); err == nil || !strings.Contains(err.Error(), "no such") {
		t.Errorf("copy to where nothing is: %v", err)
	}
}

// A file larger than the guest's memory and than what this process may hold.
func TestCopyLargeFile(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("copies much data")
	}
	const size = 192 << 20
	m := openReal(t)
	vm := mustRun(t, m, smolvm.VMConfig{MemoryMiB: 128})
	path := filepath.Join(t.TempDir(), "large")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.New()
	chunk := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for i := range size / len(chunk) {
		chunk[0] = byte(i)
		_, _ = io.MultiWriter(file, sum).Write(chunk)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := m.CopyTo(t.Context(), vm.ID, path, "/root/large"); err != nil {
		t.Fatal(err)
	}
	if err := m.CopyFrom(t.Context(), vm.ID, "/root/large", path+".back"); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 32<<20 {
		t.Errorf("copying %d MiB grew the heap by %d MiB", size>>20, grown>>20)
	}
	back := sha256.New()
	copied, err := os.Open(path + ".back")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = copied.Close() }()
	if _, err := io.Copy(back, copied); err != nil {
		t.Fatal(err)
	}
	if got, want := hex.EncodeToString(back.Sum(nil)), hex.EncodeToString(sum.Sum(nil)); got != want {
		t.Errorf("what came back has the hash %s, want %s", got, want)
	}
}

// stockSSH runs the commands of SSH as they are, by the stock client, and scp, which
// understand the guest as well.
func stockSSH(t *testing.T, m *manager.Manager, vm smolvm.VMInfo) {
	access, err := m.SSH(t.Context(), vm.ID, smolvm.SSHOptions{PublicHost: "vm.example.org", User: "user"})
	if err != nil {
		t.Fatal(err)
	}
	if want := "ssh -p " + strconv.Itoa(vm.Network.SSHHostPort) + " user@vm.example.org"; access.Public() != want {
		t.Errorf("access is %+v, want public %q", access, want)
	}
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skip("the stock client is not installed: ", err)
	}
	out, err := exec.Command("sh", "-c", access.String()+" 'id -un; hostname'").CombinedOutput()
	if err != nil || string(out) != "user\n"+vm.ID+"\n" {
		t.Errorf("%s: %v\n%s", access.String(), err, out)
	}
	access, err = m.SSH(t.Context(), vm.ID, smolvm.SSHOptions{})
	if err != nil {
		t.Fatal(err)
	}
	args := access.Args
	// The same options serve scp, which calls the port -P.
	options := append(args[1:len(args)-3:len(args)-3], "-P", args[len(args)-2])
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("by scp"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err = exec.Command("scp", append(options, "-q", file, "root@127.0.0.1:/tmp/file")...).CombinedOutput()
	if err != nil {
		t.Fatalf("scp: %v\n%s", err, out)
	}
	if got := sh(t, m, vm.ID, "cat /tmp/file"); got != "by scp" {
		t.Errorf("scp brought %q", got)
	}
	// Another VM's key must be refused.
	other := mustCreate(t, m, smolvm.VMConfig{ID: "other"})
	stranger, err := m.SSH(t.Context(), other.ID, smolvm.SSHOptions{})
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Replace(stranger.String(), "-p "+strconv.Itoa(other.Network.SSHHostPort), "-p "+strconv.Itoa(vm.Network.SSHHostPort), 1)
	if out, err := exec.Command("sh", "-c", line+" true").CombinedOutput(); err == nil || !strings.Contains(string(out), "verification failed") {
		t.Errorf("the host key of another VM is taken: %v\n%s", err, out)
	}
}
