package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/step"
)

// A VM whose restoring, or forking, was cut short before it ran has the disk of what it was
// to go on from, whenever that was, and although there is a template of its kind.
func TestKilledBeforeRestoredVMRuns(t *testing.T) {
	t.Parallel()
	eachDisk(t, killedBeforeRestoredVMRuns)
}

func killedBeforeRestoredVMRuns(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{}); err != nil {
		t.Fatal(err)
	}
	mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	sh(t, m, "vm", "echo kept > /root/file")
	snapshot := func() {
		t.Helper()
		if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "kept"}); err != nil {
			t.Fatal(err)
		}
	}
	interrupt := func(from, work, point string) {
		t.Helper()
		c := startChild(t, m, from, work, step.CrashEnv+"="+point)
		c.await(t, "begun")
		if c.lines.Scan() {
			t.Fatalf("the child says %q; it was to be killed", c.lines.Text())
		}
		_ = c.cmd.Wait()
		if _, err := m.Reconcile(t.Context()); err != nil {
			t.Errorf("Reconcile: %v", err)
		}
	}
	snapshot()
	for _, test := range []struct {
		from, work, id, point string
		hasDisk               bool
	}{
		{"vm", "fork", "forked", "create/reserved", false},
		{"kept", "restore", "restored", "create/disk", true},
		{"kept", "restore", "restored", "create/reserved", false},
	} {
		t.Run(test.work+" at "+test.point, func(t *testing.T) {
			interrupt(test.from, test.work, test.point)
			vm := mustGet(t, m, test.id)
			if _, err := os.Stat(vm.DiskPath); (err == nil) != (test.hasDisk && !k.isRaw()) || vm.State != smolvm.StateCreated {
				t.Fatalf("it is %s, and its disk: %v", vm.State, err)
			}
			if !test.hasDisk && test.work == "restore" { // its snapshot may be removed meanwhile
				if err := m.RemoveSnapshot(t.Context(), "kept"); err != nil {
					t.Fatal(err)
				}
			}
			vm, err := m.Start(t.Context(), test.id, smolvm.StartOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if got := sh(t, m, test.id, "cat /root/file"); got != "kept" {
				t.Errorf("the file says %q", got)
			}
			if report := startReport(t, vm, smolvm.StartBoot); !strings.Contains(strings.Join(report.Warnings, "; "), "cut short") {
				t.Errorf("warnings are %q", report.Warnings)
			}
			if err := m.Delete(t.Context(), test.id, smolvm.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	// Where that disk is gone, for which somebody has to remove it by hand, there is no other.
	snapshot()
	interrupt("kept", "restore", "create/reserved")
	before, err := filepath.Glob(filepath.Join(strings.NewReplacer("[", "\\[").Replace(m.DataDir()), "layers", "snapshot-*"))
	if err != nil || len(before) == 0 {
		t.Fatalf("layers are %q, %v", before, err)
	}
	if err := m.RemoveSnapshot(t.Context(), "kept"); err != nil {
		t.Error(err)
	}
	if err := m.Delete(t.Context(), "vm", smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	for _, path := range before {
		if err := os.Remove(path); err != nil {
			t.Errorf("one that is needed has gone: %v", err)
		}
	}
	if _, err := m.Start(t.Context(), "restored", smolvm.StartOptions{}); err == nil || !strings.Contains(err.Error(), filepath.Dir(before[0])) {
		t.Errorf("without the snapshot's disk: %v", err)
	}
	if err := m.Delete(t.Context(), "restored", smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

// A disk that was retained is not replaced by that of a snapshot, nor taken for it.
func TestRestoreBesideRetainedDisk(t *testing.T) {
	t.Parallel()
	eachDisk(t, restoreBesideRetainedDisk)
}

func restoreBesideRetainedDisk(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	vm := mustRun(t, m, smolvm.VMConfig{ID: "vm", RetainDisk: true})
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "kept"}); err != nil {
		t.Fatal(err)
	}
	if err := m.Delete(t.Context(), "vm", smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(vm.DiskPath)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.RestoreSnapshot(t.Context(), "kept", smolvm.RestoreOptions{}); err == nil || !strings.Contains(err.Error(), vm.DiskPath) {
		t.Errorf("restored over a disk: %v", err)
	}
	if after, err := os.Stat(vm.DiskPath); err != nil || !os.SameFile(before, after) {
		t.Errorf("the disk is another one, %v", err)
	}
	if _, err := m.Get(t.Context(), "vm"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("a VM was made: %v", err)
	}
	if err := errors.Join(os.Remove(vm.DiskPath), m.RemoveSnapshot(t.Context(), "kept")); err != nil {
		t.Error(err)
	}
}
