package manager_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/glob"
	"github.com/smolvm/smolvm/manager"
)

// openFast is openReal with templates.
func openFast(t testing.TB) *manager.Manager {
	t.Helper()
	config := useReal(t)
	config.Templates = manager.TemplateConfig{}
	return openAt(t, config)
}

// awaitTemplates waits until no template is being made.
func awaitTemplates(t testing.TB, m *manager.Manager) {
	t.Helper()
	paths, err := glob.In(filepath.Join(m.DataDir(), "templates"), ".lock-*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		lock, err := os.Open(path)
		if err == nil {
			err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = lock.Close()
	}
}

func startReport(t testing.TB, vm smolvm.VMInfo, method smolvm.StartMethod) *smolvm.StartReport {
	t.Helper()
	if vm.Start == nil {
		t.Fatalf("VM %s has no report of its start", vm.ID)
	}
	if vm.Start.Method != method {
		t.Fatalf("VM %s was started by %s, want %s; warnings %q", vm.ID, vm.Start.Method, method, vm.Start.Warnings)
	}
	return vm.Start
}

// identityOf prints, a line each, what no two guests may have in common.
const identityOf = `hostname
cat /etc/machine-id /proc/sys/kernel/random/boot_id /sys/class/net/eth0/address
cat /proc/sys/kernel/random/uuid
head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'`

// hasCorrectClock compares the guest's clock with the host's.
func hasCorrectClock(t testing.TB, m *manager.Manager, id string) {
	t.Helper()
	var seconds int64
	if _, err := fmt.Sscan(sh(t, m, id, "date +%s"), &seconds); err != nil {
		t.Fatal(err)
	}
	if off := time.Since(time.Unix(seconds, 0)); off < -2*time.Second || off > 10*time.Second {
		t.Errorf("the clock of VM %s is off by %s", id, off)
	}
}

// What a guest has run before it was frozen is there in every clone, and in the VM that was
// booted for the lack of one. A clone, and a VM that stood by in a pool, are no duplicates of
// each other or of the first, know the time, and work as any VM does.
func TestClonesAnswer(t *testing.T) {
	t.Parallel()
	m := openFast(t)
	config := smolvm.VMConfig{ID: "first", WarmUp: "echo warm > /run/warm; (sleep 1000 >/dev/null 2>&1 &)"}
	vms := []smolvm.VMInfo{mustRun(t, m, config)}
	startReport(t, vms[0], smolvm.StartBoot)
	config.ID, config.DiskIOPS = "clone", 1000
	vms = append(vms, mustRun(t, m, config))
	report := startReport(t, vms[1], smolvm.StartClone)
	want := []string{"hostname", "machine-id", "SSH host key", "boot id", "MAC", "random numbers"}
	if !slices.Equal(report.Verified, want) || len(report.Warnings) > 0 || report.Limits.DiskIOPS != 1000 {
		t.Errorf("report is %+v", report)
	}
	pool, err := m.SetPool(t.Context(), smolvm.PoolOptions{Size: 1, WarmUp: config.WarmUp})
	if err != nil || pool.Ready != 1 {
		t.Fatalf("pool is %+v, %v", pool, err)
	}
	config.ID = "pooled"
	vms = append(vms, mustRun(t, m, config))
	if got := startReport(t, vms[2], smolvm.StartPool).Limits.DiskIOPS; got != 1000 {
		t.Errorf("a VM of the pool may make %d reads and writes a second", got)
	}
	if err := m.RemovePool(t.Context(), pool.ID); err != nil {
		t.Error(err)
	}
	seen := map[string]string{}
	for _, vm := range vms {
		if vm.ID != "first" {
			hasCorrectClock(t, m, vm.ID)
		}
		if got := sh(t, m, vm.ID, "cat /sys/class/net/eth0/mtu"); got != "65520" && vm.Backend == "qemu" {
			t.Errorf("VM %s has an MTU of %s", vm.ID, got)
		}
		if got := sh(t, m, vm.ID, "cat /run/warm; pidof sleep | wc -w"); got != "warm\n1" {
			t.Errorf("VM %s says %q", vm.ID, got)
		}
		lines := strings.Split(sh(t, m, vm.ID, identityOf), "\n")
		if len(lines) != 6 || lines[0] != vm.ID || lines[3] != vm.Network.GuestMAC {
			t.Errorf("identity of VM %s is %q", vm.ID, lines)
		}
		for _, line := range lines {
			if other := seen[line]; other != "" {
				t.Errorf("VMs %s and %s have %q in common", vm.ID, other, line)
			}
			seen[line] = vm.ID
		}
	}
	// Their disks are their own, and stay when they boot from them.
	sh(t, m, "pooled", "echo mine > /root/file")
	sh(t, m, "clone", "test ! -e /root/file")
	if _, err := m.Stop(t.Context(), "pooled", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(t.Context(), "pooled", smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, "pooled", "cat /root/file"); got != "mine" {
		t.Errorf("the file says %q", got)
	}
}

// The first start of a kind boots, later ones are clones, none of which is another's
// duplicate. All ways out of a clone are taken on it: it works as any VM does.
func TestClones(t *testing.T) {
	t.Parallel()
	eachDisk(t, clones)
}

func clones(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	first := mustRun(t, m, smolvm.VMConfig{ID: "first"})
	report := startReport(t, first, smolvm.StartBoot)
	if len(report.Timeline) == 0 || report.Accelerator == "" || report.Backend != "qemu" {
		t.Errorf("report is %+v", report)
	}
	// Of those that are started while the template is made, all wait for it.
	const count = 4
	vms := make([]smolvm.VMInfo, count)
	errs := make([]error, count)
	var running sync.WaitGroup
	for i := range vms {
		running.Go(func() {
			vm, err := m.Create(t.Context(), smolvm.VMConfig{ID: fmt.Sprintf("clone-%d", i), DiskIOPS: int64(1000 * i)}, smolvm.CreateOptions{})
			if err == nil {
				vms[i], err = m.Start(t.Context(), vm.ID, smolvm.StartOptions{})
			}
			errs[i] = err
		})
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	templates, err := m.Templates(t.Context())
	if err != nil || len(templates) != 1 {
		t.Fatalf("templates are %+v, %v", templates, err)
	}
	seen := map[string]string{}
	for i, vm := range append(vms, first) {
		// Each has its own limit; the first VM, and so the template, has none.
		if got, want := vm.Start.Limits.DiskIOPS, int64(1000*(i%count)); got != want {
			t.Errorf("VM %s may make %d reads and writes a second, want %d", vm.ID, got, want)
		}
		if vm.ID != "first" {
			report := startReport(t, vm, smolvm.StartClone)
			want := []string{"hostname", "machine-id", "SSH host key", "boot id", "MAC", "random numbers"}
			if report.Source != templates[0].ID || !slices.Equal(report.Verified, want) || len(report.Warnings) > 0 {
				t.Errorf("report of VM %s is %+v", vm.ID, report)
			}
			hasCorrectClock(t, m, vm.ID)
		}
		lines := strings.Split(sh(t, m, vm.ID, identityOf), "\n")
		if len(lines) != 6 || lines[0] != vm.ID || lines[3] != vm.Network.GuestMAC {
			t.Errorf("identity of VM %s is %q", vm.ID, lines)
		}
		access, err := m.SSH(t.Context(), vm.ID, smolvm.SSHOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range append(lines, access.String()) {
			if other := seen[line]; other != "" {
				t.Errorf("VMs %s and %s have %q in common", vm.ID, other, line)
			}
			seen[line] = vm.ID
		}
	}
	got, err := m.Get(t.Context(), "clone-0")
	if err != nil || got.Start == nil || got.Start.Method != smolvm.StartClone {
		t.Errorf("what was written down of the start is %+v, %v", got.Start, err)
	}
	// A clone's disk is its own, and stays when it is started again, from its disk.
	sh(t, m, "clone-0", "echo mine > /root/file")
	sh(t, m, "clone-1", "test ! -e /root/file")
	if _, err := m.Stop(t.Context(), "clone-0", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := m.RemoveTemplate(t.Context(), templates[0].ID); err != nil {
		t.Fatal(err)
	}
	again, err := m.Start(t.Context(), "clone-0", smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	startReport(t, again, smolvm.StartBoot)
	if got := sh(t, m, "clone-0", "cat /root/file"); got != "mine" {
		t.Errorf("the file says %q", got)
	}
	sh(t, m, "clone-1", "echo goes on > /root/other && sync")
}

// Cold boots are to be had for the asking, and make no templates. VMs that can't be
// cloned are booted without a word.
func TestCold(t *testing.T) {
	t.Parallel()
	m := openFakeFast(t)
	vm := mustCreate(t, m, smolvm.VMConfig{})
	vm, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{Cold: true})
	if err != nil {
		t.Fatal(err)
	}
	startReport(t, vm, smolvm.StartBoot)
	drive := filepath.Join(tempDir(t), "drive")
	if err := os.WriteFile(drive, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	report := startReport(t, mustRun(t, m, smolvm.VMConfig{Drives: []smolvm.Drive{{Path: drive}}}), smolvm.StartBoot)
	if len(report.Warnings) > 0 {
		t.Errorf("warnings are %q", report.Warnings)
	}
	awaitTemplates(t, m)
	if templates, err := m.Templates(t.Context()); err != nil || len(templates) != 0 {
		t.Errorf("templates are %+v, %v", templates, err)
	}
}

// A template that is of no use is replaced, and costs nothing but the time: the VM boots
// and says why.
func TestDamagedTemplate(t *testing.T) {
	t.Parallel()
	eachDisk(t, damagedTemplate)
}

func damagedTemplate(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	path := func(template smolvm.Template, name string) string {
		return filepath.Join(m.DataDir(), "templates", template.ID, name)
	}
	for _, test := range []struct {
		name   string
		damage func(template smolvm.Template) error
		word   string
	}{
		{"memory is cut short", func(template smolvm.Template) error {
			return os.Truncate(path(template, "memory"), template.Size/2)
		}, "damaged"},
		{"a byte of the memory has flipped", func(template smolvm.Template) error {
			return flipByte(path(template, "memory"))
		}, "damaged"},
		{"a byte of the state has flipped", func(template smolvm.Template) error {
			return flipByte(path(template, "state"))
		}, "damaged"},
		{"the disk is gone", func(template smolvm.Template) error {
			return os.Remove(path(template, "disk."+k.format()))
		}, "no such file"},
		{"what describes it is garbage", func(template smolvm.Template) error {
			return os.WriteFile(path(template, "snapshot.json"), []byte("{"), 0o600)
		}, "snapshot"},
	} {
		t.Run(test.name, func(t *testing.T) {
			template, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := test.damage(template); err != nil {
				t.Fatal(err)
			}
			vm := mustRun(t, m, smolvm.VMConfig{})
			report := startReport(t, vm, smolvm.StartBoot)
			if len(report.Warnings) != 1 || !strings.Contains(report.Warnings[0], test.word) {
				t.Errorf("warnings are %q, want one with %q", report.Warnings, test.word)
			}
			if got := sh(t, m, vm.ID, "echo works"); got != "works" {
				t.Errorf("the VM says %q", got)
			}
			startReport(t, mustRun(t, m, smolvm.VMConfig{}), smolvm.StartClone)
		})
	}
}

// flipByte changes one byte in the middle of what a file holds.
func flipByte(path string) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	at, err := unix.Seek(int(file.Fd()), 0, unix.SEEK_DATA)
	if err != nil {
		return err
	}
	at += 1234
	b := make([]byte, 1)
	if _, err := file.ReadAt(b, at); err != nil {
		return err
	}
	b[0] ^= 0x10
	_, err = file.WriteAt(b, at)
	return err
}

// A state that verifies but that the VMM can't load falls back as well.
func TestUnloadableTemplate(t *testing.T) {
	t.Parallel()
	eachDisk(t, unloadableTemplate)
}

func unloadableTemplate(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	template, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// As if QEMU could not read what it wrote: the memory's file can't be opened.
	memory := filepath.Join(m.DataDir(), "templates", template.ID, "memory")
	if err := os.Rename(memory, memory+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(memory, 0o700); err != nil {
		t.Fatal(err)
	}
	vm := mustRun(t, m, smolvm.VMConfig{})
	report := startReport(t, vm, smolvm.StartBoot)
	if len(report.Warnings) == 0 {
		t.Error("there is no warning")
	}
	sh(t, m, vm.ID, "true")
}

// What a guest has run before it was frozen is there in every clone, and in the VM that
// was booted for the lack of one.
func TestWarmUp(t *testing.T) {
	t.Parallel()
	eachDisk(t, warmUp)
}

func warmUp(t *testing.T, k kind) {
	m := openFakeFastKind(t, k)
	config := smolvm.VMConfig{WarmUp: "echo warm > /run/warm"}
	for _, method := range []smolvm.StartMethod{smolvm.StartBoot, smolvm.StartClone} {
		vm := mustRun(t, m, config)
		startReport(t, vm, method)
		if got := sh(t, m, vm.ID, "cat /run/warm"); got != "warm" {
			t.Errorf("by %s the guest says %q", method, got)
		}
	}
	_, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{WarmUp: "echo nothing doing >&2; exit 3"})
	if err == nil || !strings.Contains(err.Error(), "nothing doing") {
		t.Errorf("a warm-up that fails: %v", err)
	}
	if templates, err := m.Templates(t.Context()); err != nil || len(templates) != 1 {
		t.Errorf("templates are %+v, %v", templates, err)
	}
}

// Templates are removed when they take too much of the disk, the least used first, and
// with their image.
func TestPruneTemplates(t *testing.T) {
	t.Parallel()
	m := openFakeFast(t)
	var ids []string
	for _, memory := range []int{192, 256} {
		template, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{MemoryMiB: memory})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, template.ID)
		again, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{MemoryMiB: memory})
		if err != nil || again.ID != template.ID {
			t.Errorf("built again it is %s, %v; want %s", again.ID, err, template.ID)
		}
	}
	startReport(t, mustRun(t, m, smolvm.VMConfig{MemoryMiB: 192}), smolvm.StartClone)
	templates, err := m.Templates(t.Context())
	if err != nil || len(templates) != 2 {
		t.Fatalf("templates are %+v, %v", templates, err)
	}
	removed, err := m.PruneTemplates(t.Context(), smolvm.PruneTemplateOptions{MaxBytes: templates[0].Size + templates[1].Size - 1})
	if err != nil || !slices.Equal(removed, ids[1:]) {
		t.Errorf("removed %q, %v; want %q", removed, err, ids[1:])
	}
	if err := m.RemoveTemplate(t.Context(), "nothing"); !errors.Is(err, smolvm.ErrTemplateNotFound) {
		t.Errorf("removing what is not there: %v", err)
	}
	if removed, err := m.PruneTemplates(t.Context(), smolvm.PruneTemplateOptions{All: true}); err != nil || len(removed) != 1 {
		t.Errorf("removed %q, %v", removed, err)
	}
}
