package manager_test

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// child is another process that creates and starts a VM.
type child struct {
	cmd   *exec.Cmd
	lines *bufio.Scanner
}

func startChild(t *testing.T, m *manager.Manager, id, kind string, env ...string) child {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, childCommand, m.DataDir(), m.SocketDir(), childAgent(t, m), id, kind)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return child{cmd, bufio.NewScanner(stdout)}
}

// childAgent is the agent that a child makes images with.
func childAgent(t *testing.T, m *manager.Manager) string {
	t.Helper()
	if kindOf(m.DataDir()).isFake() {
		return fakeAgent(m.DataDir())
	}
	return testenv.Agent(t)
}

// await reads the child's next line.
func (c child) await(t *testing.T, want string) {
	t.Helper()
	if !c.lines.Scan() || c.lines.Text() != want {
		t.Fatalf("the child says %q, want %q", c.lines.Text(), want)
	}
}

func (c child) kill(t *testing.T) {
	t.Helper()
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.cmd.Wait()
}

// A process that is killed while QEMU boots a VM leaves a VM that can be started again, or one
// that runs.
func TestKilledWhileStarting(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	for _, delay := range []time.Duration{400 * time.Millisecond, time.Second} {
		c := startChild(t, m, "victim", "lasting")
		c.await(t, "created")
		time.Sleep(delay) // the point at which the plug is pulled
		c.kill(t)
		awaitSettled(t, m, "victim")
		vm := mustGet(t, m, "victim")
		if dead, err := m.Reconcile(t.Context()); err != nil || len(dead) != 0 {
			t.Errorf("%s: Reconcile = %q, %v", delay, dead, err)
		}
		if vm.State != smolvm.StateRunning { // a fast host has come that far
			if vm.State != smolvm.StateCreated {
				t.Errorf("%s: the VM is %s", delay, vm.State)
			}
			checkEmpty(t, m.SocketDir())
		}
		if err := m.Delete(t.Context(), "victim", smolvm.DeleteOptions{}); err != nil {
			t.Errorf("%s: %v", delay, err)
		}
	}
}

// An ephemeral VM goes with the process that it belongs to, however far it has come.
func TestEphemeralGoesWithItsCreator(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	t.Run("created", func(t *testing.T) {
		c := startChild(t, m, "brief", "ephemeral-create-only")
		c.await(t, "created")
		if _, err := m.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Get(t.Context(), "brief"); err != nil {
			t.Errorf("Reconcile took a VM whose creator lives: %v", err)
		}
		c.kill(t)
		if _, err := m.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Get(t.Context(), "brief"); !errors.Is(err, smolvm.ErrVMNotFound) {
			t.Errorf("after its creator was killed: %v", err)
		}
	})
	t.Run("running", func(t *testing.T) {
		c := startChild(t, m, "brief", "ephemeral")
		c.await(t, "created")
		c.await(t, "started")
		vm, err := m.Get(t.Context(), "brief")
		if err != nil || vm.State != smolvm.StateRunning {
			t.Fatalf("the VM is %s, %v", vm.State, err)
		}
		c.kill(t)
		if err := waitEnd(t, vm); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Get(t.Context(), "brief"); !errors.Is(err, smolvm.ErrVMNotFound) {
			t.Errorf("after its creator was killed: %v", err)
		}
	})
}

// A VM that does not depend on its creator survives it.
func TestVMSurvivesItsCreator(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	c := startChild(t, m, "lasting", "lasting")
	c.await(t, "created")
	c.await(t, "started")
	c.kill(t)
	if got := sh(t, m, "lasting", "echo alive"); got != "alive" {
		t.Errorf("exec printed %q", got)
	}
}
