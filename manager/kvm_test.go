package manager_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/manager"
)

// kvmBootTimeout is longer than what a guest on working KVM needs: where KVM is itself
// emulated, a boot takes half a minute.
const kvmBootTimeout = 4 * time.Minute

// What other tests show of emulated VMs is so on KVM: a VM that stood still knows the time, a
// saved one goes on in another, and whichever process of one is killed, the other goes too and
// nothing is left. That VMs boot there, are cloned and forked, and stand by in pools is shown
// by the tests of those, which use what accelerator there is.
func TestOnKVM(t *testing.T) {
	testenv.RequireKVM(t)
	m := openReal(t)
	ctx := t.Context()
	vm := mustCreate(t, m, smolvm.VMConfig{ID: "first", MemoryMiB: 256, PortForwards: []smolvm.PortForward{{HostAddr: ownAddr(t), GuestPort: webPort}}})
	vm, err := m.Start(ctx, vm.ID, smolvm.StartOptions{Timeout: kvmBootTimeout})
	if err != nil {
		t.Fatal(err)
	}
	if vm.Accelerator != vmm.KVM {
		t.Fatalf("the VM runs on %s", vm.Accelerator)
	}
	t.Run("copy", func(t *testing.T) {
		dir := t.TempDir()
		content := strings.Repeat("0123456789abcdef", 1<<16)
		if err := os.WriteFile(filepath.Join(dir, "to"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := m.CopyTo(ctx, vm.ID, filepath.Join(dir, "to"), "/root/copied"); err != nil {
			t.Fatal(err)
		}
		if err := m.CopyFrom(ctx, vm.ID, "/root/copied", filepath.Join(dir, "from")); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "from")); err != nil || string(got) != content {
			t.Errorf("%d bytes came back, %v, want the same %d", len(got), err, len(content))
		}
	})
	t.Run("pause", func(t *testing.T) {
		if _, err := m.Pause(ctx, vm.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second) // the guest's clock stands still for that long
		if _, err := m.Resume(ctx, vm.ID); err != nil {
			t.Fatal(err)
		}
		hasCorrectClock(t, m, vm.ID)
	})
	sh(t, m, vm.ID, "echo before > /root/file; "+counter)
	t.Run("snapshot", func(t *testing.T) {
		if _, err := m.CreateSnapshot(ctx, vm.ID, smolvm.SnapshotOptions{Name: "saved"}); err != nil {
			t.Fatal(err)
		}
		sh(t, m, vm.ID, "echo after > /root/file")
		restored, err := m.RestoreSnapshot(ctx, "saved", smolvm.RestoreOptions{ID: "second"})
		if err != nil {
			t.Fatal(err)
		}
		if report := startReport(t, restored, smolvm.StartSnapshot); len(report.Warnings) > 0 || len(report.Verified) < 6 || restored.Accelerator != vmm.KVM {
			t.Errorf("report is %+v, on %s", report, restored.Accelerator)
		}
		if got := sh(t, m, "second", "cat /root/file; ps | grep -c '[c]ount.sh'"); got != "before\n1" {
			t.Errorf("the restored VM says %q", got)
		}
		hasCorrectClock(t, m, "second")
		first, second := strings.Split(sh(t, m, vm.ID, identityOf), "\n"), strings.Split(sh(t, m, "second", identityOf), "\n")
		for i, line := range first {
			if slices.Contains(second, line) {
				t.Errorf("both VMs have %q, which is line %d of what is its own", line, i)
			}
		}
		if err := m.RemoveSnapshot(ctx, "saved"); err != nil {
			t.Error(err)
		}
	})
	t.Run("forward", func(t *testing.T) {
		sh(t, m, vm.ID, "mkdir /www && echo page > /www/index.html && httpd -p 8000 -h /www")
		if got := get(t, dialTCP(t, vm.Network.PortForwards[0])); !strings.Contains(got, "page") {
			t.Errorf("by a forward: %q", got)
		}
	})
	t.Run("kill QEMU", func(t *testing.T) { killOnKVM(t, m, "second", func(vm smolvm.VMInfo) int { return vm.PID }) })
	t.Run("kill the shim", func(t *testing.T) { killOnKVM(t, m, vm.ID, func(vm smolvm.VMInfo) int { return vm.ShimPID }) })
}

// killOnKVM kills a process of a VM: the VM is in error then, and nothing of it runs.
func killOnKVM(t *testing.T, m *manager.Manager, id string, victim func(smolvm.VMInfo) int) {
	t.Helper()
	vm := mustGet(t, m, id)
	if !vm.State.Alive() {
		t.Fatalf("VM %s is %s (%s)", id, vm.State, vm.Cause)
	}
	if err := syscall.Kill(victim(vm), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := waitEnd(t, vm); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := mustGet(t, m, id); got.State != smolvm.StateError || got.PID != 0 {
		t.Errorf("VM %s is %s, with process %d", id, got.State, got.PID)
	}
	awaitSettled(t, m, id) // the test's time bounds it
}
