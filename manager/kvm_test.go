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

// What other tests show of emulated VMs is so on KVM, by each backend: a VM that stood still knows
// the time, a saved one goes on in another, clones and forks are VMs of their own, and whichever
// process of one is killed, the other goes too and nothing is left.
func TestOnKVM(t *testing.T) {
	testenv.RequireKVM(t)
	for _, backend := range []string{"qemu", "firecracker"} {
		t.Run(backend, func(t *testing.T) { onKVM(t, backend) })
	}
}

func onKVM(t *testing.T, backend string) {
	config := useReal(t)
	config.Backend, config.Templates = backend, manager.TemplateConfig{}
	m := openAt(t, config)
	ctx := t.Context()
	vm := mustCreate(t, m, smolvm.VMConfig{ID: "first", MemoryMiB: 256, PortForwards: []smolvm.PortForward{{HostAddr: ownAddr(t), GuestPort: webPort}}})
	vm, err := m.Start(ctx, vm.ID, smolvm.StartOptions{Timeout: kvmBootTimeout, Cold: true})
	if err != nil {
		t.Fatal(err)
	}
	if vm.Accelerator != vmm.KVM || vm.Backend != backend {
		t.Fatalf("the VM runs on %s, by %s", vm.Accelerator, vm.Backend)
	}
	t.Run("usage", func(t *testing.T) { hasUsed(t, m, vm.ID) })
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
	t.Run("fork", func(t *testing.T) {
		sh(t, m, vm.ID, "echo forked > /root/file")
		forked, err := m.Fork(ctx, vm.ID, smolvm.ForkOptions{IDs: []string{"child"}})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("the parent was held for %s", forked.Pause)
		for _, id := range []string{"child", vm.ID} {
			if got := sh(t, m, id, "cat /root/file; echo "+id+" > /root/file"); got != "forked" {
				t.Errorf("VM %s says %q", id, got)
			}
		}
		if got := sh(t, m, "child", "sync; cat /root/file"); got != "child" {
			t.Errorf("the child's file is %q", got)
		}
	})
	t.Run("clone and pool", func(t *testing.T) {
		if _, err := m.BuildTemplate(ctx, smolvm.TemplateOptions{MemoryMiB: 256, Timeout: kvmBootTimeout}); err != nil {
			t.Fatal(err)
		}
		clone := mustRun(t, m, smolvm.VMConfig{ID: "clone", MemoryMiB: 256})
		startReport(t, clone, smolvm.StartClone)
		pool, err := m.SetPool(ctx, smolvm.PoolOptions{Size: 1, MemoryMiB: 256})
		if err != nil {
			t.Fatal(err)
		}
		claimed := mustRun(t, m, smolvm.VMConfig{ID: "claimed", MemoryMiB: 256})
		startReport(t, claimed, smolvm.StartPool)
		if got := sh(t, m, "claimed", "hostname"); got != "claimed" {
			t.Errorf("the VM of the pool is called %q", got)
		}
		if err := m.RemovePool(ctx, pool.ID); err != nil {
			t.Error(err)
		}
		if _, err := m.Stop(ctx, "clone", smolvm.StopOptions{}); err != nil {
			t.Error(err)
		}
	})
	t.Run("kill the VMM", func(t *testing.T) { killOnKVM(t, m, "second", func(vm smolvm.VMInfo) int { return vm.PID }) })
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
