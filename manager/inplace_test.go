package manager_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// A VM goes back to its snapshot under its own id, and is as it was if it can't.
func TestRestoreInPlace(t *testing.T) {
	t.Parallel()
	eachDisk(t, restoreInPlace)
}

func restoreInPlace(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	vm := mustRun(t, m, smolvm.VMConfig{ID: "vm", Labels: map[string]string{"team": "blue"}, SSHHostAddr: ownAddr(t)})
	sh(t, m, "vm", "echo one > /root/file")
	machine := sh(t, m, "vm", "cat /etc/machine-id; hostname")
	snapshot := func(name string) {
		t.Helper()
		if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	snapshot("good")
	// In this one, programs are stuck.
	sh(t, m, "vm", `cp /bin/true /root/true; rm /bin/true; printf '#!/bin/sh\nwhile :; do sleep 1; done\n' > /bin/true; chmod +x /bin/true`)
	snapshot("bad")
	sh(t, m, "vm", "cp /root/true /bin/true; chmod 755 /bin/true; echo two > /root/file; sync")
	inPlace := func(name string, opts smolvm.RestoreOptions) (smolvm.VMInfo, error) {
		opts.InPlace = true
		return m.RestoreSnapshot(t.Context(), name, opts)
	}
	if _, err := inPlace("good", smolvm.RestoreOptions{}); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("a VM that runs: %v", err)
	}
	stop := func() {
		t.Helper()
		if _, err := m.Stop(t.Context(), "vm", smolvm.StopOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	for _, opts := range []smolvm.RestoreOptions{{ID: "other"}, {Ephemeral: true}} {
		if _, err := inPlace("good", opts); !errors.Is(err, smolvm.ErrUnsupported) {
			t.Errorf("with %+v: %v", opts, err)
		}
	}
	fails := func(name string, opts smolvm.RestoreOptions) {
		t.Helper()
		before, err := os.Stat(vm.DiskPath)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := inPlace(name, opts); !errors.Is(err, smolvm.ErrNotRestored) {
			t.Errorf("%s: %v", name, err)
		}
		after, err := os.Stat(vm.DiskPath)
		if err != nil || !os.SameFile(before, after) {
			t.Errorf("%s: the disk is another one, %v", name, err)
		}
		if got, err := m.Get(t.Context(), "vm"); err != nil || got.State != smolvm.StateStopped {
			t.Errorf("%s: the VM is %s (%s), %v", name, got.State, got.Cause, err)
		}
	}
	fails("bad", smolvm.RestoreOptions{Start: smolvm.StartOptions{Timeout: 2 * time.Second}})
	// Nothing that its disk needs was taken for unneeded.
	if _, err := m.Reconcile(t.Context()); err != nil {
		t.Error(err)
	}
	back, err := inPlace("good", smolvm.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if report := startReport(t, back, smolvm.StartSnapshot); len(report.Warnings) > 0 || len(report.Verified) < 6 {
		t.Errorf("report is %+v", report)
	}
	if back.ID != "vm" || back.Config.Labels["team"] != "blue" || back.Network.SSHHostPort != vm.Network.SSHHostPort {
		t.Errorf("restored: %+v", back)
	}
	if got := sh(t, m, "vm", "cat /root/file; cat /etc/machine-id; hostname"); got != "one\n"+machine {
		t.Errorf("the guest says %q", got)
	}
	hasCorrectClock(t, m, "vm")
	sh(t, m, "vm", "echo three > /root/file; sync")
	stop()
	if err := flipByte(filepath.Join(m.DataDir(), "snapshots", "good", "memory")); err != nil {
		t.Fatal(err)
	}
	fails("good", smolvm.RestoreOptions{})
	booted, err := inPlace("good", smolvm.RestoreOptions{AllowCold: true})
	if err != nil {
		t.Fatal(err)
	}
	if report := startReport(t, booted, smolvm.StartBoot); !strings.Contains(strings.Join(report.Warnings, "; "), "damaged") {
		t.Errorf("warnings are %q", report.Warnings)
	}
	if got := sh(t, m, "vm", "cat /root/file"); got != "one" {
		t.Errorf("from the snapshot's disk the VM says %q", got)
	}
	if _, err := os.Lstat(filepath.Join(m.DataDir(), "vms", "vm", "disk.kept")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the disk that was kept: %v", err)
	}
	if err := errors.Join(m.RemoveSnapshot(t.Context(), "good"), m.RemoveSnapshot(t.Context(), "bad")); err != nil {
		t.Error(err)
	}
}

// ticking is a guest without an agent that counts. On its disk, if it has one, it writes each
// number to a place of its own, and looks at the place of the next, which is empty unless the
// disk is of another time than the memory.
const ticking = `i=0; while :; do i=$((i+1))
	printf '%08d' $i | dd of=/dev/vda bs=8 seek=$((8192+i)) conv=notrunc,fsync 2>/dev/null
	echo 3 > /proc/sys/vm/drop_caches
	echo "tick $i next [$(dd if=/dev/vda bs=8 skip=$((8193+i)) count=1 2>/dev/null | tr -d '\0')]"
	sleep 0.2
done
`

// A VM with a kernel of its own is saved and goes back to that under its own id, with a disk
// or without. As a new VM it would be another's duplicate.
func TestRestoreWithoutAgent(t *testing.T) {
	t.Parallel()
	disk := filepath.Join(t.TempDir(), "disk")
	content := make([]byte, 1<<20)
	copy(content[0x438:], "\x53\xef") // looks like ext4 to a probe, and is no more
	if err := os.WriteFile(disk, content, 0o600); err != nil {
		t.Fatal(err)
	}
	kernel, initrd := testenv.Kernel(t), testenv.Initramfs(t, ticking)
	for id, test := range map[string]struct {
		rootfs string
		kind   kind
	}{"with-disk": {disk, realKind}, "without-disk": {"", realKind}, "with-raw-disk": {disk, rawRealKind}} {
		t.Run(id, func(t *testing.T) {
			m, rootfs := openAt(t, useRealKind(t, test.kind)), test.rootfs
			vm := mustRun(t, m, smolvm.VMConfig{ID: id, KernelPath: kernel, InitrdPath: initrd, RootfsPath: rootfs})
			awaitTick(t, m, id, func(ticks []int) bool { return len(ticks) > 0 && ticks[len(ticks)-1] >= 3 })
			taken, err := m.CreateSnapshot(t.Context(), id, smolvm.SnapshotOptions{Name: "kept"})
			if err != nil {
				t.Fatal(err)
			}
			if taken.Synced {
				t.Error("a guest without an agent is said to have been synced")
			}
			saved := awaitTick(t, m, id, func([]int) bool { return true })
			at := saved[len(saved)-1]
			awaitTick(t, m, id, func(ticks []int) bool { return ticks[len(ticks)-1] >= at+4 })
			if _, err := m.Fork(t.Context(), id, smolvm.ForkOptions{}); !errors.Is(err, smolvm.ErrUnsupported) {
				t.Errorf("a fork: %v", err)
			}
			if _, err := m.Stop(t.Context(), id, smolvm.StopOptions{}); err != nil {
				t.Fatal(err)
			}
			if _, err := m.RestoreSnapshot(t.Context(), "kept", smolvm.RestoreOptions{ID: "twin"}); !errors.Is(err, smolvm.ErrUnsupported) || !strings.Contains(err.Error(), "in place") {
				t.Errorf("as a new VM: %v", err)
			}
			before := awaitTick(t, m, id, func([]int) bool { return true })
			back, err := m.RestoreSnapshot(t.Context(), "kept", smolvm.RestoreOptions{InPlace: true})
			if err != nil {
				t.Fatal(err)
			}
			startReport(t, back, smolvm.StartSnapshot)
			if back.ID != id || back.Network.GuestIP != vm.Network.GuestIP {
				t.Errorf("restored: %+v", back)
			}
			ticks := awaitTick(t, m, id, func(ticks []int) bool { return len(ticks) > len(before)+1 })
			if first := ticks[len(before)]; first < 3 || first > at+1 {
				t.Errorf("it was saved at %d, or little before, and went on at %d", at, first)
			}
			if err := errors.Join(m.Delete(t.Context(), id, smolvm.DeleteOptions{})); err != nil {
				t.Fatal(err)
			}
			// A later VM of that id has another address, and the guest in the snapshot does not know.
			mustCreate(t, m, smolvm.VMConfig{ID: "in-between", KernelPath: kernel, InitrdPath: initrd})
			mustCreate(t, m, smolvm.VMConfig{ID: id, KernelPath: kernel, InitrdPath: initrd, RootfsPath: rootfs})
			if _, err := m.RestoreSnapshot(t.Context(), "kept", smolvm.RestoreOptions{InPlace: true}); !errors.Is(err, smolvm.ErrUnsupported) {
				t.Errorf("into a later VM of its id: %v", err)
			}
			if err := errors.Join(m.Delete(t.Context(), id, smolvm.DeleteOptions{}), m.Delete(t.Context(), "in-between", smolvm.DeleteOptions{}), m.RemoveSnapshot(t.Context(), "kept")); err != nil {
				t.Error(err)
			}
		})
	}
}

// awaitTick waits until what a ticking guest has counted is enough, in all of its runs.
func awaitTick(t *testing.T, m *manager.Manager, id string, enough func([]int) bool) []int {
	t.Helper()
	for {
		log, err := m.Logs(t.Context(), id, smolvm.LogOptions{})
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(log)
		_ = log.Close()
		if err != nil {
			t.Fatal(err)
		}
		var ticks []int
		lines := strings.Split(string(text), "\n")
		for _, line := range lines[:len(lines)-1] { // the last one is not complete
			at := strings.Index(line, "tick ")
			if at < 0 {
				continue
			}
			var tick int
			var next string
			if n, _ := fmt.Sscanf(line[at:], "tick %d next %s", &tick, &next); n == 2 {
				ticks = append(ticks, tick)
				if next != "[]" {
					t.Errorf("the disk is of another time than the memory: %q", line)
				}
			}
		}
		if enough(ticks) {
			return ticks
		}
		time.Sleep(20 * time.Millisecond) // the test's time bounds it
	}
}
