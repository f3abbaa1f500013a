package manager_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flock"
)

// A VM whose shim has died is left alone by those who only look at it, as long as somebody
// else is changing it: what they would clean up may be that one's by then (C8).
func TestReadersLeaveLockedVMs(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	runtime := filepath.Dir(vm.SocketPath)
	lock, err := os.OpenFile(filepath.Join(m.DataDir(), "locks", "vm"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := flock.TryLock(lock); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(vm.ShimPID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := waitEnd(t, vm); err != nil {
		t.Fatal(err)
	}
	look := func() {
		t.Helper()
		if _, err := m.Get(t.Context(), "vm"); err != nil {
			t.Error(err)
		}
		if _, err := m.List(t.Context(), smolvm.ListOptions{}); err != nil {
			t.Error(err)
		}
		if _, err := m.Reconcile(t.Context()); err != nil {
			t.Error(err)
		}
	}
	look()
	if _, err := os.Stat(runtime); err != nil {
		t.Errorf("its sockets were removed while it was locked: %v", err)
	}
	events, err := m.Events(t.Context(), smolvm.EventOptions{VM: "vm", Limit: 1})
	if err != nil || len(events) != 1 || events[0].Action != "start" {
		t.Errorf("the last event is %+v, %v", events, err)
	}
	_ = lock.Close()
	look()
	if _, err := os.Stat(runtime); err == nil {
		t.Error("its sockets are there still")
	}
	if got := mustGet(t, m, "vm"); got.State != smolvm.StateError {
		t.Errorf("it is %s", got.State)
	}
}

// With a timeout a VM that is deleted is shut down first, as far as its guest lets it in
// that time; without one it is ended at once.
func TestDeleteWithTimeout(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	for _, test := range []struct {
		timeout time.Duration
		hung    bool
		want    bool // its file was written out
		atLeast time.Duration
		atMost  time.Duration
	}{
		{timeout: 0, want: false, atMost: time.Second},
		{timeout: time.Minute, want: true, atMost: 30 * time.Second},
		{timeout: 2 * time.Second, hung: true, want: false, atLeast: 2 * time.Second, atMost: 4 * time.Second},
	} {
		t.Run(fmt.Sprintf("%s, hung: %v", test.timeout, test.hung), func(t *testing.T) {
			drive := filepath.Join(tempDir(t), "drive")
			if err := os.WriteFile(drive, make([]byte, 8<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			vm := mustRun(t, m, smolvm.VMConfig{Drives: []smolvm.Drive{{Path: drive}}})
			// In the guest's memory only, until it is shut down.
			sh(t, m, vm.ID, "echo 100000 > /proc/sys/vm/dirty_expire_centisecs; echo 100000 > /proc/sys/vm/dirty_writeback_centisecs; exec 3<>/dev/vdb; echo kept >&3; sleep 1000 <&3 >/dev/null 2>&1 &")
			if test.hung {
				if _, err := m.Pause(t.Context(), vm.ID); err != nil {
					t.Fatal(err)
				}
				if err := syscall.Kill(vm.PID, syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			began := time.Now()
			if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{Timeout: test.timeout}); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took < test.atLeast || took > test.atMost+hostSlack {
				t.Errorf("it took %s, want %s to %s", took, test.atLeast, test.atMost)
			}
			content, err := os.ReadFile(drive)
			if err != nil || strings.HasPrefix(string(content), "kept") != test.want {
				t.Errorf("the drive begins with %q, %v; written out: want %v", content[:8], err, test.want)
			}
		})
	}
}
