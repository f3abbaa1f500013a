package manager_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// moments are when the plug is pulled. Saving a guest takes some 300 ms here, and so
// does starting from one that was saved; hosts differ, so the tests hold for any.
var moments = []time.Duration{
	0, 5 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond,
	150 * time.Millisecond, 200 * time.Millisecond, 300 * time.Millisecond, 500 * time.Millisecond,
}

// pull has another process do some work, and kills it in the middle of that.
func pull(t *testing.T, m *manager.Manager, id, work string, after time.Duration) {
	t.Helper()
	c := startChild(t, m, id, work)
	c.await(t, "begun")
	time.Sleep(after) // the moment at which the plug is pulled
	c.kill(t)
}

// A process that is killed while it saves a VM does not harm the VM, and the snapshot is
// either complete or not there.
func TestKilledWhileSaving(t *testing.T) {
	t.Parallel()
	eachDisk(t, func(t *testing.T, k kind) {
		interruptSaving(t, k, func(t *testing.T, m *manager.Manager, moment time.Duration) {
			pull(t, m, "vm", "snapshot", moment)
		})
	})
}

// Nor does one that only gives up.
func TestSavingGivenUp(t *testing.T) {
	t.Parallel()
	eachDisk(t, func(t *testing.T, k kind) { interruptSaving(t, k, giveUp) })
}

func giveUp(t *testing.T, m *manager.Manager, moment time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), moment)
	defer cancel()
	_, err := m.CreateSnapshot(ctx, "vm", smolvm.SnapshotOptions{Name: "taken"})
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%s: %v", moment, err)
	}
	if all, listErr := m.Snapshots(t.Context()); listErr != nil || (err == nil) != (len(all) == 1) {
		t.Errorf("%s: snapshots are %+v, %v, and taking one said: %v", moment, all, listErr, err)
	}
}

// shWhileSaved is sh for a VM that may be in the middle of being saved, which ends commands where
// the guest channel is reset by it.
func shWhileSaved(t *testing.T, m *manager.Manager, id, line string) string {
	t.Helper()
	for {
		var out bytes.Buffer
		status, err := m.Exec(t.Context(), id, smolvm.Command{Args: []string{"sh", "-c", line}, Stdout: &out, Stderr: &out})
		switch {
		case err == nil && status.Success():
			return strings.TrimSpace(out.String())
		case err == nil || !strings.Contains(err.Error(), "saving the VM ended it"):
			t.Fatalf("%s: %s, %v\n%s", line, status, err, out.String())
		}
	}
}

func interruptSaving(t *testing.T, k kind, interrupt func(t *testing.T, m *manager.Manager, moment time.Duration)) {
	t.Helper()
	m := openFakeKind(t, k)
	mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	began := time.Now()
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "whole"}); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(began)
	if err := m.RemoveSnapshot(t.Context(), "whole"); err != nil {
		t.Fatal(err)
	}
	const parts = 12
	complete := 0
	for i := range parts + 2 { // to a little after its end
		moment := whole * time.Duration(i) / parts
		word := fmt.Sprintf("round-%d", i)
		sh(t, m, "vm", "echo "+word+" > /root/file")
		interrupt(t, m, moment)
		// At once, as impatient people do: the shim may still be at it.
		if got := shWhileSaved(t, m, "vm", "cat /root/file; grep -qx "+word+" /root/all 2>/dev/null || echo "+word+" >> /root/all"); got != word {
			t.Errorf("%s: the file says %q", moment, got)
		}
		if _, err := m.Reconcile(t.Context()); err != nil {
			t.Errorf("%s: Reconcile: %v", moment, err)
		}
		all, err := m.Snapshots(t.Context())
		if err != nil || len(all) > 1 {
			t.Fatalf("%s: snapshots are %+v, %v", moment, all, err)
		}
		for _, one := range all {
			complete++
			restored, err := m.RestoreSnapshot(t.Context(), one.Name, smolvm.RestoreOptions{})
			if err != nil {
				t.Fatalf("%s: %v", moment, err)
			}
			startReport(t, restored, smolvm.StartSnapshot)
			if got := sh(t, m, restored.ID, "cat /root/file"); got != word {
				t.Errorf("%s: the restored file says %q", moment, got)
			}
			if err := errors.Join(m.Delete(t.Context(), restored.ID, smolvm.DeleteOptions{}), m.RemoveSnapshot(t.Context(), one.Name)); err != nil {
				t.Error(err)
			}
		}
		checkEmpty(t, filepath.Join(m.DataDir(), "snapshots"))
	}
	t.Logf("of %d snapshots, %d were complete", parts+2, complete)
	// It can still be saved, and its disk has all that was ever written.
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "last"}); err != nil {
		t.Error(err)
	}
	if err := m.RemoveSnapshot(t.Context(), "last"); err != nil {
		t.Error(err)
	}
	if _, err := m.Stop(t.Context(), "vm", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(t.Context(), "vm", smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Fields(sh(t, m, "vm", "cat /root/all")); len(got) != parts+2 {
		t.Errorf("after a restart the disk has %q", got)
	}
}

// The same when it is not the process that asked for it which dies, but the VM's shim:
// the VM is lost, but neither its disk nor a snapshot that was reported.
func TestShimKilledWhileSaving(t *testing.T) {
	t.Parallel()
	eachDisk(t, shimKilledWhileSaving)
}

func shimKilledWhileSaving(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	for i := 0; i < len(moments); i += 2 {
		moment := moments[i]
		vm := mustRun(t, m, smolvm.VMConfig{ID: "vm"})
		sh(t, m, "vm", "echo kept > /root/file; sync")
		saving := make(chan error, 1)
		go func() {
			_, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "taken"})
			saving <- err
		}()
		time.Sleep(moment) // the moment at which the plug is pulled
		if err := syscall.Kill(vm.ShimPID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		saveErr := <-saving
		all, err := m.Snapshots(t.Context())
		if err != nil || (saveErr == nil) != (len(all) == 1) {
			t.Fatalf("%s: snapshots are %+v, %v, and taking one said: %v", moment, all, err, saveErr)
		}
		if err := waitEnd(t, vm); err != nil {
			t.Fatal(err)
		}
		if vm, err = m.Get(t.Context(), "vm"); err != nil || vm.State != smolvm.StateError {
			t.Fatalf("%s: the VM is %s, %v", moment, vm.State, err)
		}
		if _, err := m.Reconcile(t.Context()); err != nil {
			t.Errorf("%s: Reconcile: %v", moment, err)
		}
		rescue := mustRun(t, m, smolvm.VMConfig{Drives: []smolvm.Drive{{Path: vm.DiskPath}}})
		if got := sh(t, m, rescue.ID, "mount /dev/vdb /mnt; cat /mnt/root/file"); got != "kept" {
			t.Errorf("%s: the disk's file says %q", moment, got)
		}
		if err := errors.Join(m.Delete(t.Context(), rescue.ID, smolvm.DeleteOptions{}), m.Delete(t.Context(), "vm", smolvm.DeleteOptions{})); err != nil {
			t.Error(err)
		}
		if saveErr == nil {
			if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
				t.Error(err)
			}
		}
	}
}

// awaitSettled waits until the shim of a VM whose launcher died has undone what it did,
// or the VM runs.
func awaitSettled(t *testing.T, m *manager.Manager, id string) {
	t.Helper()
	for {
		left := processesOf(m, id)
		if len(left) == 0 {
			return
		}
		if vm, err := m.Get(t.Context(), id); err == nil && vm.State == smolvm.StateRunning {
			return
		}
		var pid int
		_, _ = fmt.Sscan(left[0], &pid)
		start, err := proc.StartTime(pid)
		if err != nil {
			continue // it has ended
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_ = proc.Wait(ctx, pid, start) // it may begin to run instead
		cancel()
	}
}

// processesOf lists the processes of a VM, and not those of other data directories' VMs of
// that name. A shim has the directory in no argument, but its log is in there.
func processesOf(m *manager.Manager, id string) []string {
	return slices.DeleteFunc(append(testenv.Processes("/"+id+"/"), testenv.Processes(" "+id+" ")...), func(process string) bool {
		pid, args, _ := strings.Cut(process, ": ")
		log, _ := os.Readlink(filepath.Join("/proc", pid, "fd/2"))
		return !strings.Contains(args, m.DataDir()) && !strings.HasPrefix(log, m.DataDir())
	})
}
