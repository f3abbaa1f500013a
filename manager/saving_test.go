package manager_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/internal/snapshot"
)

// While one VM is saved, however long that takes, the disks of others can be made and
// collected (C5).
func TestSavingLocksNobodyOut(t *testing.T) {
	t.Parallel()
	eachDisk(t, savingLocksNobodyOut)
}

func savingLocksNobodyOut(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	vm := mustRun(t, m, smolvm.VMConfig{ID: "web"})
	if err := syscall.Kill(vm.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := func() { _ = syscall.Kill(vm.PID, syscall.SIGCONT) }
	t.Cleanup(resume)
	saved := make(chan error, 1)
	go func() {
		_, err := m.CreateSnapshot(t.Context(), "web", smolvm.SnapshotOptions{Name: "ready"})
		saved <- err
	}()
	// The saving has begun when there is an overlay for the VM to get, or a copy of its disk.
	begun := func() bool {
		found, _ := glob.In(filepath.Dir(vm.LogPath), "*.overlay")
		_ = filepath.WalkDir(filepath.Join(m.DataDir(), "snapshots"), func(path string, _ fs.DirEntry, _ error) error {
			if filepath.Base(path) == snapshot.DiskFile(disk.Raw) {
				found = append(found, path)
			}
			return nil
		})
		return len(found) > 0
	}
	limit := time.After(time.Minute)
	for !begun() {
		select {
		case err := <-saved:
			t.Fatalf("the snapshot of a VMM that hangs: %v", err)
		case <-limit:
			t.Fatal("the saving never begins")
		case <-time.After(10 * time.Millisecond):
		}
	}
	lock, err := os.OpenFile(filepath.Join(m.DataDir(), "layers", ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	// It may be held for a moment still, while the overlay is written.
	for flock.TryLock(lock) != nil {
		select {
		case <-limit:
			t.Fatal("the lock of all disks is held while a VM is saved")
		case <-time.After(10 * time.Millisecond):
		}
	}
	_ = lock.Close()
	// A collection in the middle of it takes nothing away.
	if _, err := m.Reconcile(t.Context()); err != nil {
		t.Error(err)
	}
	resume()
	if err := <-saved; err != nil {
		t.Fatal(err)
	}
	restored, err := m.RestoreSnapshot(t.Context(), "ready", smolvm.RestoreOptions{ID: "child"})
	if err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, restored.ID, "echo awake"); got != "awake" {
		t.Errorf("what was restored says %q", got)
	}
	if err := m.RemoveSnapshot(t.Context(), "ready"); err != nil {
		t.Error(err)
	}
}
