package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
)

// counter counts seconds in the guest's memory, and writes them down where no disk is.
const counter = `cat > /run/count.sh <<'.'
i=0; while :; do i=$((i+1)); echo $i > /run/count; sleep 1; done
.
sh /run/count.sh >/dev/null 2>&1 &`

func TestPause(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustRun(t, m, smolvm.VMConfig{})
	if _, err := m.Resume(t.Context(), vm.ID); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("resuming a running VM: %v", err)
	}
	paused, err := m.Pause(t.Context(), vm.ID)
	if err != nil || paused.State != smolvm.StatePaused {
		t.Fatalf("state is %s, %v", paused.State, err)
	}
	if _, err := m.Pause(t.Context(), vm.ID); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("pausing a paused VM: %v", err)
	}
	if _, err := m.Exec(t.Context(), vm.ID, smolvm.Command{Args: []string{"true"}}); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("exec in a paused VM: %v", err)
	}
	time.Sleep(3 * time.Second) // the guest's clock stands still for that long
	resumed, err := m.Resume(t.Context(), vm.ID)
	if err != nil || resumed.State != smolvm.StateRunning {
		t.Fatalf("state is %s, %v", resumed.State, err)
	}
	hasCorrectClock(t, m, vm.ID)
	if _, err := m.Pause(t.Context(), vm.ID); err != nil {
		t.Fatal(err)
	}
	stopped, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{})
	if err != nil || stopped.State != smolvm.StateStopped || !strings.Contains(stopped.Cause, "powered off") {
		t.Errorf("stopping a paused VM: %s, %q, %v", stopped.State, stopped.Cause, err)
	}
}

// A child that can't start programs is not handed out, and nothing of it is left.
func TestForkOfGuestThatHangs(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	mustRun(t, m, smolvm.VMConfig{ID: "parent"})
	// To the agent this is as if programs got stuck in the kernel.
	sh(t, m, "parent", `rm /bin/true; printf '#!/bin/sh\nwhile :; do sleep 1; done\n' > /bin/true; chmod +x /bin/true`)
	options := smolvm.ForkOptions{Count: 2, Start: smolvm.StartOptions{Timeout: 2 * time.Second}}
	if forked, err := m.Fork(t.Context(), "parent", options); !errors.Is(err, smolvm.ErrNotRestored) {
		t.Errorf("forked %+v, %v, want %v", forked, err, smolvm.ErrNotRestored)
	}
	if vms, err := m.List(t.Context(), smolvm.ListOptions{}); err != nil || len(vms) != 1 {
		t.Errorf("%d VMs are there, %v", len(vms), err)
	}
	if got := sh(t, m, "parent", "echo awake"); got != "awake" {
		t.Errorf("the parent says %q", got)
	}
}

// A snapshot that an older program took says that it may be damaged.
func TestSnapshotOfOlderProgram(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "old"}); err != nil {
		t.Fatal(err)
	}
	restore := func(id, want string) {
		t.Helper()
		vm, err := m.RestoreSnapshot(t.Context(), "old", smolvm.RestoreOptions{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		if warnings := strings.Join(startReport(t, vm, smolvm.StartSnapshot).Warnings, "; "); (want == "") != (warnings == "") || !strings.Contains(warnings, want) {
			t.Errorf("warnings of VM %s are %q", id, warnings)
		}
	}
	restore("first", "")
	if first, err := m.Get(t.Context(), "first"); err != nil || first.Start.Accelerator != "tcg" {
		t.Skip("with KVM no snapshot was ever damaged")
	}
	record := filepath.Join(m.DataDir(), "snapshots", "old", "snapshot.json")
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	without := strings.Replace(string(text), `"exact": true`, `"exact": false`, 1)
	if without == string(text) {
		t.Fatalf("the record is %s", text)
	}
	if err := os.WriteFile(record, []byte(without), 0o600); err != nil {
		t.Fatal(err)
	}
	restore("second", "take it anew")
	if err := m.RemoveSnapshot(t.Context(), "old"); err != nil {
		t.Error(err)
	}
}

// Children go on where their parent is, with its programs, and no two have one identity. The
// parent goes on.
func TestFork(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	parent := mustRun(t, m, smolvm.VMConfig{ID: "parent"})
	sh(t, m, "parent", "echo before > /root/file; "+counter)
	forked, err := m.Fork(t.Context(), "parent", smolvm.ForkOptions{Count: 2, IDs: []string{"child"}})
	if err != nil {
		t.Fatal(err)
	}
	if forked.Pause <= 0 || forked.Pause > 10*time.Second || len(forked.Children) != 2 || forked.Children[0].ID != "child" {
		t.Errorf("forked: %+v", forked)
	}
	sh(t, m, "parent", "echo after > /root/file; sync")
	seen := map[string]string{}
	for _, vm := range append(forked.Children, parent) {
		if vm.ID != "parent" {
			report := startReport(t, vm, smolvm.StartSnapshot)
			if len(report.Warnings) > 0 || len(report.Verified) < 6 {
				t.Errorf("report of VM %s is %+v", vm.ID, report)
			}
			if got := sh(t, m, vm.ID, "cat /root/file; echo own > /root/file; ps | grep -c '[c]ount.sh'"); got != "before\n1" {
				t.Errorf("VM %s says %q", vm.ID, got)
			}
			hasCorrectClock(t, m, vm.ID)
		}
		before := sh(t, m, vm.ID, "cat /run/count")
		if got := sh(t, m, vm.ID, "sleep 2; cat /run/count"); got == before || before == "0" {
			t.Errorf("in VM %s the count is %s, then %s", vm.ID, before, got)
		}
		for line := range strings.SplitSeq(sh(t, m, vm.ID, identityOf), "\n") {
			if other := seen[line]; other != "" {
				t.Errorf("VMs %s and %s have %q in common", vm.ID, other, line)
			}
			seen[line] = vm.ID
		}
	}
	if got := sh(t, m, "parent", "cat /root/file"); got != "after" {
		t.Errorf("the parent's file says %q", got)
	}
}

// A parent can be forked again and again, and every disk of the chain is its VM's own, also
// when that boots from it. Forwards of a child are its own too.
func TestForkAgain(t *testing.T) {
	t.Parallel()
	eachDisk(t, forkAgain)
}

func forkAgain(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	forward := smolvm.PortForward{HostAddr: ownAddr(t), GuestPort: webPort}
	mustRun(t, m, smolvm.VMConfig{ID: "parent", PortForwards: []smolvm.PortForward{forward}})
	sh(t, m, "parent", "echo before > /root/file; mkdir /www")
	forked, err := m.Fork(t.Context(), "parent", smolvm.ForkOptions{Count: 2, IDs: []string{"child"}})
	if err != nil || len(forked.Children) != 2 || forked.Children[0].ID != "child" || forked.Pause <= 0 {
		t.Fatalf("forked: %+v, %v", forked, err)
	}
	for _, id := range []string{"parent", "child"} {
		sh(t, m, id, "hostname > /www/index.html; httpd -p 8000 -h /www")
		forwards, err := m.PortForwards(t.Context(), id)
		if err != nil || len(forwards) != 1 {
			t.Fatalf("forwards of VM %s are %+v, %v", id, forwards, err)
		}
		if got := get(t, dialTCP(t, forwards[0])); !strings.HasSuffix(got, id+"\n") {
			t.Errorf("by the forward of VM %s comes %q", id, got)
		}
	}
	sh(t, m, "child", "echo own > /root/file")
	sh(t, m, "parent", "echo after > /root/file; sync")
	again, err := m.Fork(t.Context(), "parent", smolvm.ForkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, again.Children[0].ID, "cat /root/file"); got != "after" {
		t.Errorf("a later child's file says %q", got)
	}
	// The chain of disks holds for cold boots too.
	for _, id := range []string{"child", "parent"} {
		if _, err := m.Stop(t.Context(), id, smolvm.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Start(t.Context(), id, smolvm.StartOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if got := sh(t, m, "parent", "cat /root/file") + sh(t, m, "child", "cat /root/file"); got != "afterown" {
		t.Errorf("after a restart the files say %q", got)
	}
	if _, err := m.Fork(t.Context(), "parent", smolvm.ForkOptions{IDs: []string{"a", "child"}}); !errors.Is(err, smolvm.ErrVMAlreadyExists) {
		t.Errorf("a fork under an id that is taken: %v", err)
	}
	if _, err := m.Get(t.Context(), "a"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("a fork that failed has left a child: %v", err)
	}
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	eachDisk(t, snapshotOfVM)
}

func snapshotOfVM(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	mustRun(t, m, smolvm.VMConfig{ID: "vm", Env: map[string]string{"WORD": "kept"}})
	sh(t, m, "vm", "echo one > /root/file; "+counter)
	taken, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "one"})
	if err != nil {
		t.Fatal(err)
	}
	if taken.Name != "one" || taken.VMID != "vm" || taken.Pause <= 0 || !taken.Synced || taken.Size == 0 {
		t.Errorf("snapshot is %+v", taken)
	}
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "one"}); !errors.Is(err, smolvm.ErrSnapshotAlreadyExists) {
		t.Errorf("a name that is taken: %v", err)
	}
	sh(t, m, "vm", "echo two > /root/file")
	if _, err := m.Pause(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "two"}); err != nil {
		t.Fatal(err)
	}
	if vm, err := m.Get(t.Context(), "vm"); err != nil || vm.State != smolvm.StatePaused {
		t.Errorf("a paused VM is %s after a snapshot, %v", vm.State, err)
	}

	beside, err := m.RestoreSnapshot(t.Context(), "one", smolvm.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	startReport(t, beside, smolvm.StartSnapshot)
	if beside.ID == "vm" || sh(t, m, beside.ID, "cat /root/file; echo $WORD; hostname") != "one\nkept\n"+beside.ID {
		t.Errorf("restored: %+v", beside)
	}
	if _, err := m.RestoreSnapshot(t.Context(), "one", smolvm.RestoreOptions{ID: "vm"}); !errors.Is(err, smolvm.ErrVMAlreadyExists) {
		t.Errorf("restored over a VM: %v", err)
	}
	if err := m.Delete(t.Context(), "vm", smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	same, err := m.RestoreSnapshot(t.Context(), "two", smolvm.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	startReport(t, same, smolvm.StartSnapshot)
	if got := sh(t, m, "vm", "cat /root/file"); same.ID != "vm" || got != "two" {
		t.Errorf("restored as %s: %q", same.ID, got)
	}
	all, err := m.Snapshots(t.Context())
	if err != nil || len(all) != 2 || all[0].Name != "one" {
		t.Errorf("snapshots are %+v, %v", all, err)
	}

	// Memory that is of no use: the disk alone will do if that is said, with a warning.
	if err := flipByte(filepath.Join(m.DataDir(), "snapshots", "one", "memory")); err != nil {
		t.Fatal(err)
	}
	if _, err := m.RestoreSnapshot(t.Context(), "one", smolvm.RestoreOptions{ID: "booted"}); !errors.Is(err, smolvm.ErrNotRestored) {
		t.Errorf("memory that is damaged: %v", err)
	}
	if _, err := m.Get(t.Context(), "booted"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("memory that is damaged leaves a VM: %v", err)
	}
	booted, err := m.RestoreSnapshot(t.Context(), "one", smolvm.RestoreOptions{ID: "booted", AllowCold: true})
	if err != nil {
		t.Fatal(err)
	}
	report := startReport(t, booted, smolvm.StartBoot)
	if len(report.Warnings) != 1 || !strings.Contains(report.Warnings[0], "damaged") {
		t.Errorf("warnings are %q", report.Warnings)
	}
	if got := sh(t, m, "booted", "cat /root/file"); got != "one" {
		t.Errorf("from its disk the VM says %q", got)
	}

	for _, name := range []string{"one", "two"} {
		if err := m.RemoveSnapshot(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	if err := m.RemoveSnapshot(t.Context(), "one"); !errors.Is(err, smolvm.ErrSnapshotNotFound) {
		t.Errorf("removing what is not there: %v", err)
	}
	if _, err := m.RestoreSnapshot(t.Context(), "one", smolvm.RestoreOptions{}); !errors.Is(err, smolvm.ErrSnapshotNotFound) {
		t.Errorf("restoring what is not there: %v", err)
	}
	if got := sh(t, m, beside.ID, "cat /root/file"); got != "one" {
		t.Errorf("without its snapshot a VM says %q", got)
	}
}

// What can't be saved is refused before anything is made.
func TestSnapshotRefusals(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	drive := filepath.Join(tempDir(t), "drive")
	if err := os.WriteFile(drive, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, m, smolvm.VMConfig{ID: "drive", Drives: []smolvm.Drive{{Path: drive}}})
	mustCreate(t, m, smolvm.VMConfig{ID: "still"})
	for id, want := range map[string]error{
		"drive": smolvm.ErrUnsupported, "still": smolvm.ErrInvalidState, "nobody": smolvm.ErrVMNotFound,
	} {
		if _, err := m.CreateSnapshot(t.Context(), id, smolvm.SnapshotOptions{}); !errors.Is(err, want) {
			t.Errorf("snapshot of VM %q: %v, want %v", id, err, want)
		}
		if _, err := m.Fork(t.Context(), id, smolvm.ForkOptions{}); !errors.Is(err, want) {
			t.Errorf("fork of VM %q: %v, want %v", id, err, want)
		}
	}
	if _, err := m.CreateSnapshot(t.Context(), "drive", smolvm.SnapshotOptions{Name: "../x"}); err == nil {
		t.Error("a snapshot may be called ../x")
	}
	checkEmpty(t, filepath.Join(m.DataDir(), "snapshots"))
}

// EnsurePool fills a pool while its caller goes on.
func TestEnsurePool(t *testing.T) {
	t.Parallel()
	eachDisk(t, ensurePool)
}

func ensurePool(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	if _, err := m.EnsurePool(t.Context(), smolvm.PoolOptions{Size: -1}); err == nil {
		t.Error("there is a pool of -1 VMs")
	}
	if pool, err := m.EnsurePool(t.Context(), smolvm.PoolOptions{Size: 1}); err != nil || pool.Size != 1 {
		t.Fatalf("pool is %+v, %v", pool, err)
	}
	pools, err := m.Pools(t.Context())
	if err != nil || len(pools) != 1 || pools[0].Size != 1 {
		t.Fatalf("pools are %+v, %v", pools, err)
	}
	for pools[0].Ready < 1 { // the test's time bounds it
		time.Sleep(10 * time.Millisecond)
		if pools, err = m.Pools(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if pool, err := m.EnsurePool(t.Context(), smolvm.PoolOptions{Size: 1}); err != nil || pool.Ready != 1 {
		t.Errorf("a pool that is full: %+v, %v", pool, err)
	}
	startReport(t, mustRun(t, m, smolvm.VMConfig{}), smolvm.StartPool)
	if err := m.RemovePool(t.Context(), pools[0].ID); err != nil {
		t.Error(err)
	}
}

// A pool's VMs take on the identity of those that claim them.
func TestPool(t *testing.T) {
	t.Parallel()
	eachDisk(t, pool)
}

func pool(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	if _, err := m.SetPool(t.Context(), smolvm.PoolOptions{}); err == nil {
		t.Error("a pool of no VMs was made")
	}
	pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 2})
	if err != nil || pool.Ready != 2 {
		t.Fatalf("pool is %+v, %v", pool, err)
	}
	var vms []smolvm.VMInfo
	for id, iops := range map[string]int64{"a": 0, "b": 5000} {
		vm := mustRun(t, m, smolvm.VMConfig{ID: id, DiskIOPS: iops})
		if got := startReport(t, vm, smolvm.StartPool).Limits.DiskIOPS; got != iops {
			t.Errorf("VM %s may make %d reads and writes a second, want %d", id, got, iops)
		}
		vms = append(vms, vm)
	}
	seen := map[string]string{}
	for _, vm := range vms {
		hasCorrectClock(t, m, vm.ID)
		for line := range strings.SplitSeq(sh(t, m, vm.ID, identityOf), "\n") {
			if other := seen[line]; other != "" {
				t.Errorf("VMs %s and %s have %q in common", vm.ID, other, line)
			}
			seen[line] = vm.ID
		}
	}
	// It is a VM like any other: it can be saved, stopped, and started again.
	sh(t, m, "a", "echo mine > /root/file")
	forked, err := m.Fork(t.Context(), "a", smolvm.ForkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, forked.Children[0].ID, "cat /root/file"); got != "mine" {
		t.Errorf("a fork of it says %q", got)
	}
	sh(t, m, "a", "echo more >> /root/file; sync")
	if _, err := m.Stop(t.Context(), "a", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(t.Context(), "a", smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, "a", "cat /root/file"); got != "mine\nmore" {
		t.Errorf("after a restart the file says %q", got)
	}
	// What was taken is made again.
	if pool, err = m.SetPool(t.Context(), smolvm.PoolOptions{Size: 2}); err != nil || pool.Ready != 2 {
		t.Errorf("pool is %+v, %v", pool, err)
	}
	if err := m.RemovePool(t.Context(), pool.ID); err != nil {
		t.Error(err)
	}
	if pools, err := m.Pools(t.Context()); err != nil || len(pools) != 0 {
		t.Errorf("pools are %+v, %v", pools, err)
	}
	if err := m.RemovePool(t.Context(), pool.ID); !errors.Is(err, smolvm.ErrPoolNotFound) {
		t.Errorf("removing what is not there: %v", err)
	}
}

// A snapshot that a newer program has made is refused, whatever it is to be restored for.
func TestSnapshotOfNewerProgram(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	if _, err := m.CreateSnapshot(t.Context(), vm.ID, smolvm.SnapshotOptions{Name: "new"}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(m.DataDir(), "snapshots", "new", "snapshot.json")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	newer := strings.Replace(string(text), `"format": 1`, `"format": 99`, 1)
	if newer == string(text) {
		t.Fatalf("the snapshot has no format: %s", text)
	}
	if err := os.WriteFile(path, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, opts := range []smolvm.RestoreOptions{{}, {AllowCold: true}} {
		if _, err := m.RestoreSnapshot(t.Context(), "new", opts); !errors.Is(err, smolvm.ErrUnsupported) || !strings.Contains(err.Error(), "format 99") || smolvm.HintOf(err) == "" {
			t.Errorf("%+v: %v", opts, err)
		}
	}
	if err := m.RemoveSnapshot(t.Context(), "new"); err != nil {
		t.Error(err)
	}
}
