package manager_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/disk"
	"github.com/smolvm/smolvm/internal/testenv"
)

// A disk outlives its VM where that is asked for, and keeps its image.
func TestRetainedDisk(t *testing.T) {
	t.Parallel()
	eachDisk(t, retainedDisk)
}

func retainedDisk(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	ctx := t.Context()
	var invalid *smolvm.ValidationError
	if _, err := m.Create(ctx, smolvm.VMConfig{DiskSizeMiB: 3}, smolvm.CreateOptions{}); !errors.As(err, &invalid) || !strings.Contains(err.Error(), "disk_size_mib") {
		t.Errorf("a disk smaller than its image: %v", err)
	}
	vm := mustRun(t, m, smolvm.VMConfig{ID: "keeper", RetainDisk: true})
	sh(t, m, vm.ID, "echo precious > /root/file")
	if err := m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(vm.DiskPath); err != nil {
		t.Fatalf("the disk is gone: %v", err)
	}
	if k.isRaw() { // it needs nothing of its image any more
		if _, err := m.PruneImages(ctx); err != nil {
			t.Error(err)
		}
	} else if err := m.RemoveImage(ctx, vm.Image); !errors.Is(err, smolvm.ErrImageInUse) || !strings.Contains(err.Error(), "keeper") {
		t.Errorf("the image of a retained disk can be removed: %v", err)
	}
	vm = mustRun(t, m, smolvm.VMConfig{ID: "keeper"})
	if got := sh(t, m, vm.ID, "cat /root/file"); got != "precious" {
		t.Errorf("the retained disk has %q", got)
	}
	if err := m.RemoveImage(ctx, smolvm.DefaultImage); !errors.Is(err, smolvm.ErrImageInUse) || !strings.Contains(err.Error(), "VM keeper") {
		t.Errorf("the image of a VM can be removed: %v", err)
	}
}

// An image goes when nothing needs it, and says what does until then; its templates go with
// it. Pruning takes those without a name, and no others.
func TestRemoveImage(t *testing.T) {
	t.Parallel()
	eachDisk(t, removeImage)
}

func removeImage(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	ctx := t.Context()
	ownFiles(t, m)
	built := buildOwn(t, m)
	if again := buildOwn(t, m); again.Digest != built.Digest {
		t.Errorf("built again it is %s, not %s", again.Digest, built.Digest)
	}
	mustRun(t, m, smolvm.VMConfig{ID: "user", Image: "mine"})
	if _, err := m.CreateSnapshot(ctx, "user", smolvm.SnapshotOptions{Name: "taken"}); err != nil {
		t.Fatal(err)
	}
	pool, err := m.SetPool(ctx, smolvm.PoolOptions{Size: 1, Image: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		user   string
		remove func() error
	}{
		{"VM user", func() error { return m.Delete(ctx, "user", smolvm.DeleteOptions{}) }},
		{"snapshot taken", func() error { return m.RemoveSnapshot(ctx, "taken") }},
		{"pool " + pool.ID, func() error { return m.RemovePool(ctx, pool.ID) }},
	} {
		if err := m.RemoveImage(ctx, "mine"); !errors.Is(err, smolvm.ErrImageInUse) || !strings.Contains(err.Error(), test.user) {
			t.Errorf("the image of %s can be removed: %v", test.user, err)
		}
		if err := test.remove(); err != nil {
			t.Fatal(err)
		}
	}
	// Under its name there is another one now, so only its digest is left of it.
	ownFiles(t, m)
	other := buildOwn(t, m)
	awaitTemplates(t, m)
	if templates, err := m.Templates(ctx); err != nil || len(templates) != 1 || templates[0].Image != built.Digest {
		t.Errorf("templates are %+v, %v", templates, err)
	}
	gone, err := m.PruneImages(ctx)
	if err != nil || len(gone) != 1 || gone[0].Digest != built.Digest {
		t.Errorf("pruned %+v, %v", gone, err)
	}
	if templates, err := m.Templates(ctx); err != nil || len(templates) != 0 {
		t.Errorf("templates of an image that is gone: %+v, %v", templates, err)
	}
	if err := m.RemoveImage(ctx, other.Digest); err != nil {
		t.Error(err)
	}
	for _, ref := range []string{"mine", other.Digest, built.Digest} {
		if err := m.RemoveImage(ctx, ref); !errors.Is(err, smolvm.ErrImageNotFound) {
			t.Errorf("removing %s, which is not there: %v", ref, err)
		}
	}
	if images, err := m.Images(ctx); err != nil || len(images) != 1 || images[0].Names[0] != smolvm.DefaultImage {
		t.Errorf("images are %+v, %v", images, err)
	}
	if _, err := m.BuildImage(ctx, ownImage(m, "mine")); err == nil || smolvm.HintOf(err) == "" {
		t.Errorf("an image without an agent: %v", err)
	}
}

// An image that is damaged can be removed, and nothing is started from it.
func TestDamagedImage(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	ownFiles(t, m)
	built := buildOwn(t, m)
	if err := os.Remove(built.KernelPath); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Create(t.Context(), smolvm.VMConfig{Image: "mine"}, smolvm.CreateOptions{}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a VM of it: %v", err)
	}
	if images, err := m.Images(t.Context()); err != nil || len(images) != 2 {
		t.Errorf("beside it there are %+v, %v", images, err)
	}
	if err := m.RemoveImage(t.Context(), built.Digest); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(built.KernelPath)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is left of it: %v", err)
	}
}

// A disk is made larger while its VM does not run, and is never made smaller.
func TestResize(t *testing.T) {
	t.Parallel()
	eachDisk(t, resize)
}

func resize(t *testing.T, k kind) {
	m := openFakeKind(t, k)
	ctx := t.Context()
	vm := mustRun(t, m, smolvm.VMConfig{ID: "vm"})
	sh(t, m, "vm", "echo kept > /root/file")
	resize := func(id string, size int64) error {
		_, err := m.Resize(ctx, id, smolvm.ResizeOptions{DiskSizeMiB: size})
		return err
	}
	if err := resize("vm", grown); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("a VM that runs: %v", err)
	}
	if _, err := m.Stop(ctx, "vm", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := resize("vm", grown); err != nil {
		t.Fatal(err)
	}
	var invalid *smolvm.ValidationError
	for _, size := range []int64{grown - 1, -1, 1 << 40} {
		if err := resize("vm", size); !errors.As(err, &invalid) {
			t.Errorf("to %d MiB: %v", size, err)
		}
	}
	if info, err := disk.Inspect(vm.DiskPath, k.format()); err != nil && !errors.Is(err, disk.ErrNoFileSystem) || info.VirtualSize != grown<<20 {
		t.Errorf("the disk is %+v, %v", info, err)
	}
	if got := mustGet(t, m, "vm"); got.Config.DiskSizeMiB != grown {
		t.Errorf("it is said to have %d MiB", got.Config.DiskSizeMiB)
	}
	if _, err := m.Start(ctx, "vm", smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, "vm", "cat /root/file"); got != "kept" {
		t.Errorf("the file says %q", got)
	}
	mustCreate(t, m, smolvm.VMConfig{ID: "new"}) // whose disk may not be there yet
	if err := resize("new", grown); err != nil {
		t.Error(err)
	}
	if err := resize("new", grown-1); !errors.As(err, &invalid) {
		t.Errorf("it was made smaller: %v", err)
	}
	if _, err := m.Start(ctx, "new", smolvm.StartOptions{}); err != nil {
		t.Error(err)
	}
	if info, err := disk.Inspect(mustGet(t, m, "new").DiskPath, k.format()); err != nil && !errors.Is(err, disk.ErrNoFileSystem) || info.VirtualSize != grown<<20 {
		t.Errorf("the disk of a new VM is %+v, %v", info, err)
	}
	mustCreate(t, m, withoutImage(t, "diskless"))
	if err := resize("diskless", grown); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("a VM without a disk: %v", err)
	}
}

// Further drives are there in their order, and what is read-only can't be written.
func TestDrives(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	dir := t.TempDir()
	var drives []smolvm.Drive
	for i, text := range []string{"first", "second"} {
		path := filepath.Join(dir, text)
		content := make([]byte, 1<<20)
		copy(content, text)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		drives = append(drives, smolvm.Drive{Path: path, ReadOnly: i == 1})
	}
	// One that is based on the second, whatever its header says.
	based := filepath.Join(dir, "based")
	qemuImgCreate(t, based, "/etc/passwd", "raw")
	drives = append(drives, smolvm.Drive{Path: based, Format: smolvm.FormatQCOW2, Backing: []smolvm.DiskFile{{Path: drives[1].Path, Format: smolvm.FormatRaw}}})
	vm := mustRun(t, m, smolvm.VMConfig{Drives: drives, DiskBytesPerSecond: 256 << 20})
	if got := sh(t, m, vm.ID, "head -c 5 /dev/vdb; head -c 6 /dev/vdc; cat /sys/block/vdc/ro; head -c 6 /dev/vdd; printf above | dd of=/dev/vdd conv=fsync 2>/dev/null"); got != "firstsecond1\nsecond" {
		t.Errorf("the guest sees %q", got)
	}
	if got := vm.Start.Limits; got.DiskBytesPerSecond != 256<<20 || got.DiskIOPS != 0 {
		t.Errorf("limits are %+v", got)
	}
	sh(t, m, vm.ID, "printf written | dd of=/dev/vdb conv=fsync 2>/dev/null; ! dd if=/dev/zero of=/dev/vdc count=1 2>/dev/null")
	if _, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{drives[0].Path: "written", drives[1].Path: "second"} {
		if got, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(got), want) {
			t.Errorf("%s begins with %q, %v", path, got[:8], err)
		}
	}
}

// qemuImgCreate makes a qcow2 disk whose header names another file.
func qemuImgCreate(t *testing.T, path, base, format string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", format, path, "1M")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", cmd, err, out)
	}
}

// A kernel and a disk of the caller's own boot untouched, also one that is based on files
// which are named; in shared mode the VM writes to that very disk.
func TestSharedDisk(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	path := filepath.Join(t.TempDir(), "disk")
	content := make([]byte, 1<<20)
	copy(content[0x438:], "\x53\xef") // looks like ext4 to a probe, and is no more
	copy(content[0x1000:], "the base")
	initrd := testenv.Initramfs(t, "dd if=/dev/vda bs=4096 skip=1 count=1 2>/dev/null | head -c 8 >/dev/console; printf shared | dd of=/dev/vda conv=fsync; echo DONE; poweroff -f\n")
	top, middle := filepath.Join(t.TempDir(), "top"), filepath.Join(t.TempDir(), "middle")
	qemuImgCreate(t, top, middle, "qcow2")
	qemuImgCreate(t, middle, "/etc/passwd", "raw") // and is not followed
	for mode, want := range map[smolvm.DiskMode]string{smolvm.DiskIsolated: "\x00\x00", smolvm.DiskShared: "shared"} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		config := smolvm.VMConfig{KernelPath: testenv.Kernel(t), InitrdPath: initrd, RootfsPath: path, DiskMode: mode}
		if mode == smolvm.DiskIsolated {
			config.RootfsPath, config.RootfsFormat = top, smolvm.FormatQCOW2
			config.RootfsBacking = []smolvm.DiskFile{{Path: middle, Format: smolvm.FormatQCOW2}, {Path: path, Format: smolvm.FormatRaw}}
		}
		vm := mustRun(t, m, config)
		if err := waitEnd(t, vm); err != nil {
			t.Fatal(err)
		}
		if log, err := os.ReadFile(vm.LogPath); err != nil || !strings.Contains(string(log), "the base") {
			t.Errorf("%s: the guest has read another disk (%v): %s", mode, err, log)
		}
		if got, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(got), want) {
			t.Errorf("%s: the disk begins with %q, %v", mode, got[:8], err)
		}
		if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Errorf("%s: the caller's disk is gone: %v", mode, err)
		}
	}
}

// An image of a kernel and a root file system of one's own, with the agent in it.
func TestImageOfOwnFiles(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	base := testenv.Image(t)
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "hello"), []byte("from my tree"), 0o644); err != nil {
		t.Fatal(err)
	}
	built, err := m.BuildImage(t.Context(), smolvm.BuildOptions{Name: "mine", Rootfs: root})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.RemoveImage(t.Context(), built.Digest); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	})
	if built.Digest == base.Digest {
		t.Error("it has the digest of the default image")
	}
	vm := mustRun(t, m, smolvm.VMConfig{Image: built.Names[0]})
	target := filepath.Join(t.TempDir(), "hello")
	if err := m.CopyFrom(t.Context(), vm.ID, "/hello", target); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(target); err != nil || string(got) != "from my tree" {
		t.Errorf("the guest's file is %q, %v", got, err)
	}
	if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := m.Create(t.Context(), smolvm.VMConfig{Image: "no-such"}, smolvm.CreateOptions{Pull: smolvm.PullNever}); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("an image that is not there: %v", err)
	}
}
