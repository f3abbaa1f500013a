package manager_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm/traits"
	"github.com/smolvm/smolvm/manager"
)

// useTwoBackends returns the configuration of a Manager that knows a backend for raw disks
// only, which it prefers, and one for both formats.
func useTwoBackends(t *testing.T) manager.Config {
	t.Helper()
	config := useFake(t)
	raw := rawQEMU{}.Traits()
	raw.Name = "rawonly"
	config.Backend = "auto"
	return manager.WithBackends(config, raw, traits.QEMU())
}

// "auto" stands for a backend that can use the disks which the VM is to have, and one that is
// named and can't is refused before anything is made.
func TestBackendByFormats(t *testing.T) {
	t.Parallel()
	m := openAt(t, useTwoBackends(t))
	dir := t.TempDir()
	raw, qcow2 := filepath.Join(dir, "raw"), filepath.Join(dir, "qcow2")
	if err := os.WriteFile(raw, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := disk.CreateOverlay(t.Context(), disk.Overlay{Path: qcow2, Base: raw, BaseFormat: disk.Raw}); err != nil {
		t.Fatal(err)
	}
	drive := smolvm.Drive{Path: qcow2, Format: smolvm.FormatQCOW2, Backing: []smolvm.DiskFile{{Path: raw, Format: smolvm.FormatRaw}}}
	own := withoutImage(t, "")
	own.RootfsPath, own.RootfsFormat, own.RootfsBacking = qcow2, smolvm.FormatQCOW2, drive.Backing
	for name, test := range map[string]struct {
		config        smolvm.VMConfig
		backend, disk string
		field         string // which is wrong if the backend for raw disks is named
	}{
		"an image":                {smolvm.VMConfig{}, "rawonly", ".raw", ""},
		"a raw drive":             {smolvm.VMConfig{Drives: []smolvm.Drive{{Path: raw}}}, "rawonly", ".raw", ""},
		"a qcow2 drive":           {smolvm.VMConfig{Drives: []smolvm.Drive{{Path: raw}, drive}}, "qemu", ".qcow2", "drives[1].path"},
		"a qcow2 root":            {own, "qemu", ".qcow2", "rootfs_path"},
		"a retained disk":         {smolvm.VMConfig{ID: "kept-raw"}, "rawonly", ".raw", ""},
		"a retained qcow2 disk":   {smolvm.VMConfig{ID: "kept-qcow2"}, "qemu", ".qcow2", "id"},
		"qemu with a new disk":    {smolvm.VMConfig{Backend: "qemu"}, "qemu", ".qcow2", ""},
		"qemu with a qcow2 drive": {smolvm.VMConfig{Backend: "qemu", Drives: []smolvm.Drive{drive}}, "qemu", ".qcow2", "drives[0].path"},
	} {
		t.Run(name, func(t *testing.T) {
			keep := func() {
				t.Helper()
				if !strings.HasPrefix(test.config.ID, "kept-") {
					return
				}
				path := filepath.Join(m.DiskDir(), test.config.ID+test.disk)
				if err := os.Link(map[string]string{".raw": raw, ".qcow2": qcow2}[test.disk], path); err != nil {
					t.Fatal(err)
				}
			}
			keep()
			vm := mustCreate(t, m, test.config)
			if vm.Backend != test.backend || !strings.HasSuffix(vm.DiskPath, test.disk) {
				t.Errorf("its backend is %s, and its disk %s", vm.Backend, vm.DiskPath)
			}
			if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			if test.field == "" {
				return
			}
			keep()
			named := test.config
			named.Backend = "rawonly"
			_, err := m.Create(t.Context(), named, smolvm.CreateOptions{})
			invalid, ok := errors.AsType[*smolvm.ValidationError](err)
			words, hint := "is qcow2, and backend rawonly can use raw only", "qemu-img convert -f qcow2 -O raw"
			if test.field == "id" {
				words, hint = "kept-qcow2.qcow2 is qcow2, and backend rawonly gives VMs disks that are raw", "move the disk away"
			}
			if !ok || len(invalid.Fields) != 1 || invalid.Fields[0].Field != test.field || !strings.Contains(err.Error(), words) || !strings.Contains(smolvm.HintOf(err), hint) {
				t.Errorf("by the one for raw disks: %v, hint %q", err, smolvm.HintOf(err))
			}
			_ = os.Remove(filepath.Join(m.DiskDir(), test.config.ID+test.disk))
		})
	}
	// A backend that prefers another format does not take a raw disk, though it can use it: an
	// earlier program would believe what a guest has written into it.
	path := filepath.Join(m.DiskDir(), "other.raw")
	if err := os.Link(raw, path); err != nil {
		t.Fatal(err)
	}
	_, err := m.Create(t.Context(), smolvm.VMConfig{ID: "other", Backend: "qemu"}, smolvm.CreateOptions{})
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "was retained") {
		t.Errorf("beside a raw disk: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Error(err)
	}
	if vms, err := m.List(t.Context(), smolvm.ListOptions{}); err != nil || len(vms) > 0 {
		t.Errorf("VMs are there: %+v, %v", vms, err)
	}
}

// A data directory with raw disks may be renamed and copied, before and after they are made.
func TestRawDisksInMovedDirectory(t *testing.T) {
	t.Parallel()
	config := useFakeKind(t, rawFakeKind)
	m := openAt(t, config)
	stepsSnapshot(t, m)
	mustCreate(t, m, smolvm.VMConfig{ID: "new"})
	if _, err := m.Stop(t.Context(), "vm", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, move := range map[string]func(to string) error{
		"copied":  func(to string) error { return exec.CommandContext(t.Context(), "cp", "-a", config.DataDir, to).Run() },
		"renamed": func(to string) error { return os.Rename(config.DataDir, to) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(filepath.Dir(config.DataDir), name)
			if err := move(dir); err != nil {
				t.Fatal(err)
			}
			other := openDir(t, config, dir)
			if vm, err := other.Start(t.Context(), "vm", smolvm.StartOptions{}); err != nil || vm.DiskPath != filepath.Join(dir, "disks", "vm.raw") {
				t.Fatalf("its disk is %s, %v", vm.DiskPath, err)
			}
			_, err := other.Start(t.Context(), "new", smolvm.StartOptions{})
			if err == nil {
				_, err = other.RestoreSnapshot(t.Context(), "saved", smolvm.RestoreOptions{ID: "restored"})
			}
			if err != nil {
				t.Fatal(err)
			}
			for id, want := range map[string]string{"vm": kept, "restored": kept, "new": ""} {
				if got := sh(t, other, id, "cat /root/file 2>/dev/null || true"); got != want {
					t.Errorf("the file of VM %s says %q", id, got)
				}
			}
			for _, id := range []string{"restored", "new"} {
				if err := other.Delete(t.Context(), id, smolvm.DeleteOptions{}); err != nil {
					t.Error(err)
				}
			}
			if _, err := other.Stop(t.Context(), "vm", smolvm.StopOptions{}); err != nil {
				t.Error(err)
			}
			if name == "copied" {
				err = os.RemoveAll(dir)
			} else {
				err = os.Rename(dir, config.DataDir)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := m.Create(t.Context(), smolvm.VMConfig{ID: "new"}, smolvm.CreateOptions{Reuse: true}); err != nil {
				t.Error(err)
			}
		})
	}
	if err := m.RemoveSnapshot(t.Context(), "saved"); err != nil {
		t.Error(err)
	}
}

// A VM with a disk that its backend can't use is not started, and stays as it is.
func TestStartWithUnusableDisk(t *testing.T) {
	t.Parallel()
	config := useFake(t)
	m := openAt(t, config)
	mustCreate(t, m, smolvm.VMConfig{ID: "vm"})
	raw, err := manager.Open(t.Context(), manager.WithBackends(config, rawQEMU{}.Traits()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	if _, err := raw.Start(t.Context(), "vm", smolvm.StartOptions{}); !errors.Is(err, smolvm.ErrUnsupported) || !strings.Contains(err.Error(), "vm.qcow2 is qcow2, and backend qemu can use raw only") {
		t.Errorf("start: %v", err)
	}
	if vm := mustGet(t, m, "vm"); vm.State != smolvm.StateCreated {
		t.Errorf("it is %s", vm.State)
	}
	if _, err := m.Start(t.Context(), "vm", smolvm.StartOptions{}); err != nil {
		t.Errorf("by a backend that can use it: %v", err)
	}
	// Nor is a snapshot with such a disk restored.
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "taken"}); err != nil {
		t.Fatal(err)
	}
	if _, err := raw.RestoreSnapshot(t.Context(), "taken", smolvm.RestoreOptions{ID: "restored"}); !errors.Is(err, smolvm.ErrUnsupported) || !strings.Contains(err.Error(), "can use raw only") {
		t.Errorf("restore: %v", err)
	}
	if _, err := m.Get(t.Context(), "restored"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("a VM was made: %v", err)
	}
	if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
		t.Error(err)
	}
}

// VMs with raw disks live as any others on a file system on which copies share blocks, and each
// of the disks is its VM's own.
func TestRawDisksShareBlocks(t *testing.T) {
	t.Parallel()
	dir := testenv.Reflinks(t)
	config := useFakeIn(t, dir, rawFakeKind)
	config.Templates = manager.TemplateConfig{}
	m := openAt(t, config)
	if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{}); err != nil {
		t.Fatal(err)
	}
	vm := mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	startReport(t, vm, smolvm.StartClone)
	sh(t, m, "vm", "echo one > /root/file; sync")
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "taken"}); err != nil {
		t.Fatal(err)
	}
	sh(t, m, "vm", "echo two > /root/file; sync")
	forked, err := m.Fork(t.Context(), "vm", smolvm.ForkOptions{Count: 2})
	if err != nil {
		t.Fatal(err)
	}
	sh(t, m, "vm", "echo three > /root/file; sync")
	restored, err := m.RestoreSnapshot(t.Context(), "taken", smolvm.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{"vm": "three", forked.Children[0].ID: "two", forked.Children[1].ID: "two", restored.ID: "one"} {
		if _, err := m.Stop(t.Context(), id, smolvm.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Start(t.Context(), id, smolvm.StartOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := sh(t, m, id, "cat /root/file"); got != want {
			t.Errorf("the file of VM %s says %q, want %q", id, got, want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*", "layers", "*.raw")); err != nil || len(left) != 2 { // of the template and the snapshot
		t.Errorf("layers are %q, %v", left, err)
	}
	if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
		t.Error(err)
	}
}

// writing is a guest that writes files, and sums of those that are complete.
const writing = `mkdir /root/d; cat > /run/write.sh <<'.'
cd /root/d; i=0; while :; do i=$((i+1))
dd if=/dev/urandom of=$i bs=64k count=3 2>/dev/null; md5sum $i >> /root/sums
done
.
sh /run/write.sh >/dev/null 2>&1 & echo $! > /run/writer; while [ ! -s /root/sums ]; do usleep 100000; done`

// checking ends that, and reads all of them anew from the disk.
const checking = `kill $(cat /run/writer); sync; echo 3 > /proc/sys/vm/drop_caches; cd /root/d; md5sum -c /root/sums >/run/checked || cat /run/checked; wc -l < /run/checked`

// Memory and disk of a real guest that writes are of one moment: in those that are forked and
// restored from it all files are what they were, and their file systems are clean.
func TestRawDisksOfRealGuests(t *testing.T) {
	t.Parallel()
	config := useRealKind(t, rawRealKind)
	config.Templates = manager.TemplateConfig{}
	m := openAt(t, config)
	ctx := t.Context()
	if _, err := m.BuildTemplate(ctx, smolvm.TemplateOptions{}); err != nil {
		t.Fatal(err)
	}
	startReport(t, mustRun(t, m, smolvm.VMConfig{ID: "vm"}), smolvm.StartClone)
	sh(t, m, "vm", writing)
	taken, err := m.CreateSnapshot(ctx, "vm", smolvm.SnapshotOptions{Name: "taken"})
	if err != nil {
		t.Fatal(err)
	}
	forked, err := m.Fork(ctx, "vm", smolvm.ForkOptions{IDs: []string{"child"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the guest was held for %s and %s", taken.Pause, forked.Pause)
	if _, err := m.RestoreSnapshot(ctx, "taken", smolvm.RestoreOptions{ID: "restored"}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"vm", "child", "restored"} {
		if got := sh(t, m, id, checking); strings.ContainsAny(got, ":\n") || got == "0" {
			t.Errorf("of the files of VM %s are right: %s", id, got)
		}
		stopped, err := m.Stop(ctx, id, smolvm.StopOptions{})
		if err != nil || !strings.HasSuffix(stopped.DiskPath, ".raw") {
			t.Fatalf("VM %s: its disk is %s, %v", id, stopped.DiskPath, err)
		}
		if out, err := exec.CommandContext(ctx, "e2fsck", "-fn", stopped.DiskPath).CombinedOutput(); err != nil {
			t.Errorf("the file system of VM %s: %v\n%s", id, err, out)
		}
	}
	// What was saved is whole without the memory, too, and a disk can be grown.
	cold, err := m.RestoreSnapshot(ctx, "taken", smolvm.RestoreOptions{ID: "cold", AllowCold: true, Start: smolvm.StartOptions{Cold: true}})
	if err != nil {
		t.Fatal(err)
	}
	startReport(t, cold, smolvm.StartBoot)
	sh(t, m, "cold", "test -s /root/sums && head -n 1 /root/sums > /run/sum && cd /root/d && md5sum -c /run/sum")
	if _, err := m.Resize(ctx, "child", smolvm.ResizeOptions{DiskSizeMiB: 12 << 10}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(ctx, "child", smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	sh(t, m, "child", "cd /root/d && md5sum -c /root/sums >/dev/null && test $(df -m / | awk 'END { print $2 }') -gt 11000")
	if err := m.RemoveSnapshot(ctx, "taken"); err != nil {
		t.Error(err)
	}
}
