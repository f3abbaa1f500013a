package shim_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
	"github.com/smolvm/smolvm/shim"
)

// withoutMain makes this test's program one that does not call [shim.Main].
const withoutMain = "SMOLVM_TEST_WITHOUT_MAIN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(withoutMain); dir != "" {
		_, err := manager.Open(context.Background(), manager.Config{DataDir: dir, Embedded: true})
		fmt.Println(err)
		return
	}
	shim.Main()
	os.Exit(m.Run())
}

// asShim returns this program, started as a Manager starts a shim.
func asShim(t *testing.T) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exec.CommandContext(t.Context(), self, "smolvm-shim", "some-vm")
}

// A program that forgets the call does not start itself again and again.
func TestMainForgotten(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	cmd := asShim(t)
	cmd.Env = append(os.Environ(), withoutMain+"="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "does not call shim.Main first") {
		t.Errorf("it says %q, %v", out, err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("it has made a data directory")
	}
}

// Orders that are none end the process, which says so.
func TestBadOrders(t *testing.T) {
	t.Parallel()
	for _, orders := range []string{"", "hello\n", "{\"task\": 7}\n", "{\"task\": {}}\n"} {
		cmd := asShim(t)
		cmd.Stdin = strings.NewReader(orders)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.HasPrefix(string(out), "shim: ") {
			t.Errorf("of %q it says %q, %v", orders, out, err)
		}
	}
}

// A program that is the shim of its VMs needs no other, and its shims end their VMs in an
// orderly way when the host shuts down.
func TestEmbedded(t *testing.T) {
	testenv.RequireQEMU(t)
	ctx := t.Context()
	data := filepath.Join(t.TempDir(), "data")
	testenv.SeedImages(t, data)
	testenv.NoProcesses(t, data)
	m, err := manager.Open(ctx, manager.Config{
		DataDir:   data,
		Embedded:  true,
		AgentPath: testenv.Agent(t),
		Templates: manager.TemplateConfig{Disabled: true}, // one VM needs none
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	if _, err := m.Create(ctx, smolvm.VMConfig{ID: "embedded"}, smolvm.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Delete(context.WithoutCancel(ctx), "embedded", smolvm.DeleteOptions{}) }()
	info, err := m.Start(ctx, "embedded", smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(info.ShimPID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	info, err = m.Wait(ctx, "embedded", smolvm.StateStopped, smolvm.StateError)
	if err != nil || info.State != smolvm.StateStopped {
		t.Errorf("the VM is %s (%s), %v", info.State, info.Cause, err)
	}
}
