package cli_test

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/smolvm/smolvm/internal/testenv"
)

// anybody is a user with no privilege and no files (nobody, on most hosts).
const anybody = 65534

// Everything works for somebody who is not root: building the image, and running a
// VM with its network. Whose the files of the guest are does not depend on who built
// the image.
func TestRunAsAnybody(t *testing.T) {
	testenv.RequireQEMU(t)
	if os.Getuid() != 0 {
		t.Skip("only root can become somebody else; the other tests have run without privilege")
	}
	dir, err := os.MkdirTemp("", "smolvm-anybody-") //nolint:usetesting // t.TempDir lets nobody else in
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	program, err := exec.LookPath("smolvm")
	if err != nil {
		t.Fatal(err)
	}
	for name, source := range map[string]string{"smolvm": program, "smolvm-agent": testenv.Agent(t)} {
		copyProgram(t, source, filepath.Join(dir, name))
	}
	for _, path := range []string{dir, filepath.Join(dir, "home")} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, anybody, anybody); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(dir, "smolvm"), args...)
		cmd.Env = []string{"HOME=" + dir + "/home", "XDG_RUNTIME_DIR=" + dir + "/home", "PATH=" + dir + ":/usr/bin:/bin"}
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: anybody, Gid: anybody}}
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("smolvm %q: %v\n%s", args, err, errs.String())
		}
		return string(out)
	}
	got := run("run", "--", "sh", "-c", "id -u; stat -c %u:%g /bin/busybox /bin/ls /etc/shadow /root; ip -o addr show eth0 | grep -c 10.0.2.15")
	if want := "0\n0:0\n0:0\n0:0\n0:0\n1\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := run("ls", "-q"); got != "" {
		t.Errorf("left behind: VMs %s", got)
	}
}

func copyProgram(t *testing.T, source, target string) {
	t.Helper()
	in, err := os.Open(source)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(target, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Chmod(0o755); err != nil {
		t.Fatal(err)
	}
}
