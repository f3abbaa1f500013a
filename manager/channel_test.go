package manager_test

import (
	"bufio"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm/vmmfake"
	"github.com/smolvm/smolvm/manager"
)

// A call that is under way when its VM is saved ends if the guest channel is reset by that, and
// says so. The next one finds the guest as it was, with the identity that it had.
func TestSavingEndsCalls(t *testing.T) {
	t.Parallel()
	m := openFakeKind(t, rawFakeKind)
	mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	const who = "cat /etc/machine-id /proc/sys/kernel/random/boot_id"
	before := sh(t, m, "vm", who+"; echo kept > /run/file")
	for _, what := range []string{"snapshot", "fork"} {
		reader, writer := io.Pipe()
		ended := make(chan error, 1)
		go func() {
			_, err := m.Exec(t.Context(), "vm", smolvm.Command{Args: []string{"sh", "-c", "echo runs; sleep 1000"}, Stdout: writer})
			ended <- err
		}()
		if line, err := bufio.NewReader(reader).ReadString('\n'); err != nil {
			t.Fatal(line, err)
		}
		var err error
		if what == "fork" {
			_, err = m.Fork(t.Context(), "vm", smolvm.ForkOptions{Count: 1, IDs: []string{"child"}})
		} else {
			_, err = m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "taken"})
		}
		if err != nil {
			t.Fatal(err)
		}
		inTime(t, what, 20*time.Second, func() error {
			if err := <-ended; err == nil || !strings.Contains(err.Error(), "saving the VM ended it") {
				t.Errorf("the command that was under way at the %s: %v", what, err)
			}
			return nil
		})
		if got := sh(t, m, "vm", who+"; cat /run/file"); got != before+"\nkept" {
			t.Errorf("after the %s the guest is %q, and was %q", what, got, before)
		}
	}
	if got := sh(t, m, "child", "cat /run/file"); got != "kept" {
		t.Errorf("the child has %q", got)
	}
	if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
		t.Error(err)
	}
}

// The channel of a VM that is saved while it is paused is opened again when it goes on.
func TestSavingPausedVM(t *testing.T) {
	t.Parallel()
	eachDisk(t, savingPausedVM)
}

func savingPausedVM(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	sh(t, m, "vm", "echo kept > /run/file")
	if _, err := m.Pause(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "taken"}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Resume(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, "vm", "cat /run/file"); got != "kept" {
		t.Errorf("the guest has %q", got)
	}
	hasCorrectClock(t, m, "vm")
	if _, err := m.Pause(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "again"}); err != nil {
		t.Fatal(err)
	}
	// Stopping it asks the agent, for which the channel is opened again.
	stopped, err := m.Stop(t.Context(), "vm", smolvm.StopOptions{})
	if err != nil || !strings.Contains(stopped.Cause, "powered off") {
		t.Errorf("stopping it: %q, %v", stopped.Cause, err)
	}
	for _, name := range []string{"taken", "again"} {
		if err := m.RemoveSnapshot(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
}

// A restored guest may reset the channel that its host has just opened; it is opened again.
func TestRestoredGuestResetsChannel(t *testing.T) {
	t.Parallel()
	m := openFakeKind(t, rawFakeKind)
	mustRun(t, m, smolvm.VMConfig{ID: "vm", BootArgs: "vmmfake=" + vmmfake.ResetsFirst})
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "taken"}); err != nil {
		t.Fatal(err)
	}
	restored, err := m.RestoreSnapshot(t.Context(), "taken", smolvm.RestoreOptions{ID: "restored"})
	if err != nil {
		t.Fatal(err)
	}
	startReport(t, restored, smolvm.StartSnapshot)
	if got := sh(t, m, "restored", "echo awake"); got != "awake" {
		t.Errorf("it says %q", got)
	}
	if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
		t.Error(err)
	}
}

// A VM whose agent can't be reached after it was saved runs, and says why it can't. It can be
// stopped.
func TestUnreachableAfterSaving(t *testing.T) {
	t.Parallel()
	m := openFakeKind(t, rawFakeKind)
	vm := mustCreate(t, m, smolvm.VMConfig{ID: "vm"})
	faulty(t, m, vm.ID, vmmfake.Unheard)
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{Timeout: 2 * time.Second}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateSnapshot(t.Context(), vm.ID, smolvm.SnapshotOptions{Name: "taken"}); err != nil {
		t.Fatal(err)
	}
	_, err := m.Exec(t.Context(), vm.ID, smolvm.Command{Args: []string{"true"}})
	if err == nil || !strings.Contains(err.Error(), "open the guest channel again") {
		t.Errorf("exec: %v", err)
	}
	got := awaitCause(t, m, vm.ID)
	if got.State != smolvm.StateRunning || !strings.Contains(got.Cause, "open the guest channel again") || !strings.Contains(got.Cause, "did not answer") {
		t.Errorf("it is %s (%s)", got.State, got.Cause)
	}
	if stopped, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{Timeout: time.Second}); err != nil || stopped.State != smolvm.StateStopped {
		t.Errorf("stopping it: %s, %v", stopped.State, err)
	}
	if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
		t.Error(err)
	}
}

// awaitCause waits until a VM has a cause.
func awaitCause(t *testing.T, m *manager.Manager, id string) (vm smolvm.VMInfo) {
	t.Helper()
	inTime(t, "a cause", 20*time.Second, func() error {
		var err error
		for vm, err = m.Get(t.Context(), id); vm.Cause == "" && err == nil; vm, err = m.Get(t.Context(), id) {
			<-time.After(10 * time.Millisecond)
		}
		return err
	})
	return vm
}
