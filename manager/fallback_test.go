package manager_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// Where there is no room for saved guests, VMs boot and say why, those that run go on,
// and nothing is left.
func TestNoRoomForSavedGuests(t *testing.T) {
	t.Parallel()
	config := useFake(t)
	config.Templates = manager.TemplateConfig{}
	onSmallDisk(t, config, "24m")
	m := openAt(t, config)
	// A guest that has this in memory takes more than that when it is saved, and next to
	// nothing while it runs.
	const large = "dd if=/dev/zero of=/tmp/large bs=1M count=20 2>/dev/null"
	const want = "no space left on device"
	for _, id := range []string{"first", "second"} {
		report := startReport(t, mustRun(t, m, smolvm.VMConfig{ID: id, WarmUp: large}), smolvm.StartBoot)
		if told := strings.Contains(strings.Join(report.Warnings, "; "), want); told != (id == "second") {
			t.Errorf("warnings of the %s are %q", id, report.Warnings)
		}
		awaitTemplates(t, m)
	}
	sh(t, m, "first", "echo before > /root/file")
	if _, err := m.CreateSnapshot(t.Context(), "first", smolvm.SnapshotOptions{}); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("snapshot: %v", err)
	}
	if _, err := m.Fork(t.Context(), "first", smolvm.ForkOptions{IDs: []string{"child"}}); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("fork: %v", err)
	}
	if got := sh(t, m, "first", "echo after >> /root/file; sync; cat /root/file"); got != "before\nafter" {
		t.Errorf("the VM's file says %q", got)
	}
	if vms, err := m.List(t.Context(), smolvm.ListOptions{}); err != nil || len(vms) != 2 {
		t.Errorf("%d VMs are there, %v", len(vms), err)
	}
	if removed, err := m.PruneTemplates(t.Context(), smolvm.PruneTemplateOptions{All: true}); err != nil || len(removed) != 0 {
		t.Errorf("removed templates %q, %v", removed, err)
	}
	for _, dir := range []string{"templates", "snapshots", "layers"} {
		checkEmpty(t, filepath.Join(m.DataDir(), dir))
	}
}

// What another QEMU has saved is not given to this one: VMs boot, from the disk that was
// saved, and say why.
func TestReplacedVMM(t *testing.T) {
	m := openFakeFast(t)
	old, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	startReport(t, mustRun(t, m, smolvm.VMConfig{ID: "vm"}), smolvm.StartClone)
	sh(t, m, "vm", "echo kept > /root/file")
	if _, err := m.CreateSnapshot(t.Context(), "vm", smolvm.SnapshotOptions{Name: "taken"}); err != nil {
		t.Fatal(err)
	}
	replaceQEMU(t)

	report := startReport(t, mustRun(t, m, smolvm.VMConfig{}), smolvm.StartBoot)
	if len(report.Warnings) != 1 || !strings.Contains(report.Warnings[0], old.ID) {
		t.Errorf("warnings are %q, want one about template %s", report.Warnings, old.ID)
	}
	if _, err := m.RestoreSnapshot(t.Context(), "taken", smolvm.RestoreOptions{}); !errors.Is(err, smolvm.ErrNotRestored) {
		t.Errorf("restored by another VMM: %v", err)
	}
	restored, err := m.RestoreSnapshot(t.Context(), "taken", smolvm.RestoreOptions{ID: "restored", AllowCold: true})
	if err != nil {
		t.Fatal(err)
	}
	report = startReport(t, restored, smolvm.StartBoot)
	if len(report.Warnings) != 1 || !strings.Contains(report.Warnings[0], "another VMM") {
		t.Errorf("warnings are %q", report.Warnings)
	}
	if got := sh(t, m, "restored", "cat /root/file"); got != "kept" {
		t.Errorf("the file says %q", got)
	}
	// The new one has made a template of its own meanwhile, and removed the other.
	startReport(t, mustRun(t, m, smolvm.VMConfig{}), smolvm.StartClone)
	awaitTemplates(t, m)
	if all, err := m.Templates(t.Context()); err != nil || len(all) != 1 || all[0].ID == old.ID || all[0].Stale {
		t.Errorf("templates are %+v, %v", all, err)
	}
	if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
		t.Error(err)
	}
}

// replaceQEMU puts another program first in PATH which is QEMU too, as after an upgrade.
func replaceQEMU(t *testing.T) {
	t.Helper()
	const name = "qemu-system-x86_64"
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script := "#!/bin/sh\nexec " + path + ` "$@"` + "\n"
	if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(filepath.ListSeparator)+os.Getenv("PATH"))
}
