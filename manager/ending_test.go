package manager_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/step"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// hostSlack is what a loaded host may add to a time.
const hostSlack = 5 * time.Second

// A shim and a VMM that hang are ended in time, and nothing of the VM is left (C3, C4). The
// disk is as after a power cut, and the VM starts from it.
func TestStopOfHungProcesses(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustRun(t, m, smolvm.VMConfig{})
	sh(t, m, vm.ID, "echo kept > /root/file; sync")
	testenv.Suspend(t, vm.ShimPID)
	inTime(t, "stop", 2*time.Second, func() error {
		stopped, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{Timeout: time.Second})
		if stopped.State != smolvm.StateStopped {
			t.Errorf("state is %s", stopped.State)
		}
		return err
	})
	if left := testenv.Processes(m.DataDir()); len(left) > 0 {
		t.Errorf("processes are left: %q", left)
	}
	vm, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, vm.ID, "cat /root/file"); got != "kept" {
		t.Errorf("the file says %q", got)
	}
	testenv.Suspend(t, vm.PID)
	testenv.Suspend(t, vm.ShimPID)
	inTime(t, "delete", time.Second, func() error { return m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}) })
	checkNothingLeft(t, testConfig(t, filepath.Dir(m.DataDir())))
}

func inTime(t *testing.T, what string, limit time.Duration, do func() error) {
	t.Helper()
	began := time.Now()
	if err := do(); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if took := time.Since(began); took > limit+hostSlack {
		t.Errorf("%s took %s, want at most %s", what, took, limit)
	}
}

// One start that fails, for want of memory or files, leaves a stopped VM as it was, with its
// data (case 23). One that had failed when it ran starts again from its disk (D5).
func TestFailedStartKeepsVM(t *testing.T) {
	m := openReal(t)
	vm := mustRun(t, m, smolvm.VMConfig{})
	sh(t, m, vm.ID, "echo precious > /root/file; sync")
	if _, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	script := "#!/bin/sh\nulimit -v 400000\nexec " + qemu + " \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "qemu-system-x86_64"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", bin+":"+path)
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err == nil || !strings.Contains(err.Error(), "memory") {
		t.Errorf("a start without memory: %v", err)
	}
	t.Setenv("PATH", path)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	few := exec.Command("/bin/sh", "-c", "ulimit -n 24; exec \"$0\" \"$@\"", self, childCommand, m.DataDir(), m.SocketDir(), testenv.Agent(t), vm.ID, "start")
	if out, err := few.CombinedOutput(); err == nil || !strings.Contains(string(out), "only 24 files open") {
		t.Errorf("a start with few files: %v, %q", err, out)
	}
	got, err := m.Get(t.Context(), vm.ID)
	if err != nil || got.State != smolvm.StateStopped || !strings.Contains(got.Cause, "its start failed") || !strings.Contains(got.Cause, "memory") {
		t.Errorf("after that it is %s (%s), %v", got.State, got.Cause, err)
	}
	events, err := m.Events(t.Context(), smolvm.EventOptions{VM: vm.ID, Limit: 1})
	if err != nil || len(events) != 1 || events[0].Action != "start-failed" {
		t.Errorf("the last event is %+v, %v", events, err)
	}
	vm, err = m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = m.Exec(t.Context(), vm.ID, smolvm.Command{Args: []string{"sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"}})
	if err := waitEnd(t, vm); err != nil {
		t.Fatal(err)
	}
	if got, err = m.Get(t.Context(), vm.ID); err != nil || got.State != smolvm.StateError {
		t.Fatalf("after a panic it is %s, %v", got.State, err)
	}
	if _, err := m.Exec(t.Context(), vm.ID, smolvm.Command{Args: []string{"true"}}); err == nil || !strings.Contains(err.Error(), "start it again") {
		t.Errorf("exec in it: %v", err)
	}
	vm, err = m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(vm.Start.Warnings) == 0 || !strings.Contains(vm.Start.Warnings[0], "panic") {
		t.Errorf("warnings are %q", vm.Start.Warnings)
	}
	if got := sh(t, m, vm.ID, "cat /root/file"); got != "precious" {
		t.Errorf("the file says %q", got)
	}
}

// Whoever is killed at whichever point of a claim, no other VM is ended, nothing is left
// behind, the pool knows how many VMs it has, and the next start succeeds (D1, D2).
func TestKilledWhileClaiming(t *testing.T) {
	t.Parallel()
	eachDisk(t, killedWhileClaiming)
}

func killedWhileClaiming(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	if _, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 1}); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		point string
		shim  bool // it is the shim that is killed
	}{
		{"claim/moved", false}, {"start/ready", false}, {"start/written", false}, {"start/confirmed", false},
		{"claim/taken", true}, {"claim/confirmed", true}, {"claim/taken over", true},
	} {
		t.Run(test.point, func(t *testing.T) {
			crash := step.CrashEnv + "=" + test.point
			mustCreate(t, m, smolvm.VMConfig{ID: "victim"})
			if test.shim {
				// Shims have the environment of whoever fills the pool.
				pools, err := m.Pools(t.Context())
				if err != nil || m.RemovePool(t.Context(), pools[0].ID) != nil {
					t.Fatal(err)
				}
				c := startChild(t, m, "", "pool", crash)
				c.await(t, "begun")
				c.await(t, "done")
				c.kill(t)
				if _, err := m.Start(t.Context(), "victim", smolvm.StartOptions{}); err != nil {
					t.Errorf("start: %v", err)
				}
			} else {
				pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 2})
				if err != nil || pool.Ready != 2 {
					t.Fatalf("pool is %+v, %v", pool, err)
				}
				c := startChild(t, m, "victim", "start", crash)
				c.await(t, "begun")
				if c.lines.Scan() {
					t.Fatalf("the child says %q; it was to be killed", c.lines.Text())
				}
				_ = c.cmd.Wait()
				if pools, err := m.Pools(t.Context()); err != nil || pools[0].Ready != 1 {
					t.Errorf("pools are %+v, %v; one VM is left", pools, err)
				}
				awaitSettled(t, m, "victim")
				for vm := mustGet(t, m, "victim"); test.point != "start/confirmed" && vm.State.Alive(); vm = mustGet(t, m, "victim") {
					time.Sleep(10 * time.Millisecond) // the shim undoes what was written down already
				}
			}
			before := mustGet(t, m, "victim")
			if before.State == smolvm.StateRunning {
				sh(t, m, "victim", "echo mine > /root/file")
			}
			// All that takes slots, fills and empties pools.
			other := mustRun(t, m, smolvm.VMConfig{ID: "other"})
			sh(t, m, other.ID, "true")
			if _, err := m.Reconcile(t.Context()); err != nil {
				t.Errorf("Reconcile: %v", err)
			}
			if pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 2}); err != nil || pool.Ready != 2 {
				t.Errorf("pool is %+v, %v", pool, err)
			}
			if left, _ := filepath.Glob(filepath.Join(m.DataDir(), "pool", "*", "*.claimed")); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
			after, err := m.Get(t.Context(), "victim")
			if err != nil || after.State != before.State || after.PID != before.PID {
				t.Errorf("the VM was %s, and is %s (%s), %v", before.State, after.State, after.Cause, err)
			}
			if test.point == "start/confirmed" { // a boot from the disk is one too many for all
				if _, err := m.Stop(t.Context(), "victim", smolvm.StopOptions{}); err != nil {
					t.Error(err)
				}
				after.State = smolvm.StateStopped
			}
			if after.State != smolvm.StateRunning {
				if _, err := m.Start(t.Context(), "victim", smolvm.StartOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			want := "none"
			if before.State == smolvm.StateRunning {
				want = "mine"
			}
			if got := sh(t, m, "victim", "cat /root/file 2>/dev/null || echo none"); got != want {
				t.Errorf("the file says %q, want %q", got, want)
			}
			if err := errors.Join(m.Delete(t.Context(), "victim", smolvm.DeleteOptions{}), m.Delete(t.Context(), "other", smolvm.DeleteOptions{})); err != nil {
				t.Error(err)
			}
		})
	}
	pools, err := m.Pools(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, pool := range pools {
		if err := m.RemovePool(t.Context(), pool.ID); err != nil {
			t.Error(err)
		}
	}
}

// A guest that fills the host's disk is paused, and says why. With no byte left, every VM can
// be listed, stopped and removed, and nothing that is asked of it hangs (D6, D7).
func TestHostDiskFull(t *testing.T) {
	t.Parallel()
	config := useFake(t)
	onSmallDisk(t, config, "48m")
	m := openAt(t, config)
	mustRun(t, m, smolvm.VMConfig{ID: "greedy", DiskSizeMiB: 256})
	mustRun(t, m, smolvm.VMConfig{ID: "modest"})
	filler := filepath.Join(config.DataDir, "filler")
	if err := os.WriteFile(filler, make([]byte, 30<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	writing := make(chan error, 1)
	go func() {
		_, err := m.Exec(ctx, "greedy", smolvm.Command{Args: []string{"sh", "-c", "dd if=/dev/zero of=/big bs=1M count=12 2>/dev/null; sync"}})
		writing <- err
	}()
	halted := awaitState(t, m, "greedy", smolvm.StatePaused)
	if !strings.Contains(halted.Cause, "disk is full") || !strings.Contains(halted.Cause, halted.DiskPath) {
		t.Errorf("cause is %q", halted.Cause)
	}
	_, err := m.Resume(t.Context(), "greedy")
	if err == nil || !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("resume with a full disk: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Resume(t.Context(), "greedy"); err != nil {
		t.Errorf("resume when there is room: %v", err)
	}
	if err := <-writing; err != nil {
		t.Errorf("the command that was in the middle of it: %v", err)
	}
	if got, err := m.Get(t.Context(), "greedy"); err != nil || got.State != smolvm.StateRunning || got.Cause != "" {
		t.Errorf("then it is %s (%s), %v", got.State, got.Cause, err)
	}

	testenv.FillDisk(t, filler)
	go func() { // it hangs until the VM ends
		_, _ = m.Exec(ctx, "greedy", smolvm.Command{Args: []string{"sh", "-c", "dd if=/dev/zero of=/more bs=1M count=12; sync"}})
	}()
	awaitState(t, m, "greedy", smolvm.StatePaused)
	testenv.FillDisk(t, filler+"2") // what was given up meanwhile
	inTime(t, "exec", time.Second, func() error {
		_, err := m.Exec(t.Context(), "greedy", smolvm.Command{Args: []string{"true"}})
		if err == nil || !strings.Contains(err.Error(), "disk is full") {
			t.Errorf("exec: %v", err)
		}
		return nil
	})
	// As another process does it.
	other, err := manager.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	if vms, err := other.List(t.Context(), smolvm.ListOptions{}); err != nil || len(vms) != 2 {
		t.Errorf("list: %+v, %v", vms, err)
	}
	inTime(t, "stop of a VM that is halted", 2*time.Second, func() error {
		_, err := other.Stop(t.Context(), "greedy", smolvm.StopOptions{})
		return err
	})
	testenv.FillDisk(t, filler+"3")
	inTime(t, "stop", 10*time.Second, func() error {
		_, err := other.Stop(t.Context(), "modest", smolvm.StopOptions{})
		return err
	})
	testenv.FillDisk(t, filler+"4")
	for _, id := range []string{"greedy", "modest"} {
		inTime(t, "delete", time.Second, func() error { return other.Delete(t.Context(), id, smolvm.DeleteOptions{}) })
	}
}

func mustGet(t *testing.T, m *manager.Manager, id string) smolvm.VMInfo {
	t.Helper()
	vm, err := m.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

func awaitState(t *testing.T, m *manager.Manager, id string, state smolvm.VMState) smolvm.VMInfo {
	t.Helper()
	for {
		vm, err := m.Get(t.Context(), id)
		if err != nil || !vm.State.Alive() {
			t.Fatalf("VM %s is %s (%s), %v", id, vm.State, vm.Cause, err)
		}
		if vm.State == state {
			return vm
		}
		time.Sleep(10 * time.Millisecond)
	}
}
