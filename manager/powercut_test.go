package manager_test

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/smolvm/smolvm"
)

// A power cut takes nothing that was reported as done: neither VMs that were started or
// deleted, nor the layers and overlays of those that were saved. The host whose power is cut
// is a guest, so that what its kernel has not written out is lost with it (D9).
func TestPowerCut(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	program := filepath.Join(t.TempDir(), "powercut")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "../internal/testenv/powercut")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	vm := mustRun(t, m, smolvm.VMConfig{ID: "host"})
	if err := m.CopyTo(t.Context(), vm.ID, program, "/root/powercut"); err != nil {
		t.Fatal(err)
	}
	sh(t, m, vm.ID, "sync")
	read, write := io.Pipe()
	go func() {
		var errs bytes.Buffer
		_, err := m.Exec(t.Context(), vm.ID, smolvm.Command{Args: []string{"/root/powercut", "work", "/root/data"}, Stdout: write, Stderr: &errs})
		if errs.Len() > 0 {
			t.Errorf("the program says: %s", errs.String())
		}
		write.CloseWithError(err)
	}()
	const enough = 36
	var said []string
	lines := bufio.NewScanner(read)
	for lines.Scan() {
		said = append(said, lines.Text())
		// The moment at which the plug is pulled: nothing else has written all out since.
		if len(said) >= enough && strings.HasPrefix(lines.Text(), "saved") {
			if err := syscall.Kill(vm.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(said) < enough {
		t.Fatalf("it said %q, %v", said, lines.Err())
	}
	if err := waitEnd(t, vm); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	status, err := m.Exec(t.Context(), vm.ID, smolvm.Command{
		Args: []string{"/root/powercut", "check", "/root/data"}, Stdin: strings.NewReader(strings.Join(said, "\n")), Stdout: &out, Stderr: &out,
	})
	found := strings.Split(strings.TrimSpace(out.String()), "\n")
	if err != nil || !status.Success() || len(found) != 1 || !strings.HasPrefix(found[0], "checked ") {
		t.Errorf("%s, %v: of %d lines, that end with %q, this is not so:\n%s", status, err, len(said), slices.Clip(said)[len(said)-3:], out.String())
	}
	t.Log(found[len(found)-1])
}
