package manager_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// openedBelow returns the files of a process that are below a directory.
func openedBelow(t *testing.T, pid int, dir string) []string {
	t.Helper()
	var found []string
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(links) == 0 {
		t.Fatalf("files of process %d: %v, %v", pid, links, err)
	}
	for _, link := range links {
		if path, err := os.Readlink(link); err == nil && strings.HasPrefix(path, dir+"/") {
			found = append(found, path)
		}
	}
	return found
}

// openDir opens a data directory by another name than the test's own.
func openDir(t *testing.T, config manager.Config, dir string) *manager.Manager {
	t.Helper()
	config.DataDir = dir
	m, err := manager.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// A data directory is the same by a link and after it was renamed; a copy of it, made
// while a VM runs, is another, and nothing that is done in it touches the original. A
// disk that has gone is not made anew. (Cases 21, 22, 24, 25.)
func TestDataDirectoryIsLinkedCopiedAndRenamed(t *testing.T) {
	testenv.RequireQEMU(t)
	config := testConfig(t, tempDir(t))
	config.AgentPath = testenv.Agent(t)
	testenv.SeedImages(t, config.DataDir)
	m := openAt(t, config)
	ctx, dir := t.Context(), config.DataDir
	vm := mustRun(t, m, smolvm.VMConfig{ID: "web"})
	sh(t, m, "web", "echo precious >/root/k; sync")

	link := filepath.Join(filepath.Dir(dir), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, openDir(t, config, link), "web", "cat /root/k"); got != "precious" {
		t.Errorf("by a link the VM says %q", got)
	}

	// With its images, as the copy's disks are to be based on nothing of the original's.
	copied := filepath.Join(filepath.Dir(dir), "copy")
	if out, err := exec.Command("cp", "-a", "--sparse=always", dir, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := openDir(t, config, copied)
	found, err := c.Get(ctx, "web")
	if err != nil || found.State != smolvm.StateStopped || !strings.Contains(found.Cause, "copied") ||
		found.DiskPath != filepath.Join(copied, "disks", "web.qcow2") || found.LogPath != filepath.Join(copied, "vms", "web", "console.log") {
		t.Errorf("in the copy the VM is %+v, %v", found, err)
	}
	if reconciled, err := c.Reconcile(ctx); err != nil || len(reconciled) != 0 {
		t.Errorf("reconcile of the copy: %v, %v", reconciled, err)
	}
	started, err := c.Start(ctx, "web", smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := sh(t, c, "web", "cat /root/k; echo copy >/root/k; sync"); got != "precious" {
		t.Errorf("in the copy the VM says %q", got)
	}
	if files := openedBelow(t, started.PID, dir); len(files) > 0 {
		t.Errorf("the copy's VM uses %q of the original", files)
	}
	if err := c.Delete(ctx, "web", smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, "web", "cat /root/k"); got != "precious" {
		t.Errorf("after the copy was used the original says %q", got)
	}
	if again, err := m.Get(ctx, "web"); err != nil || again.PID != vm.PID {
		t.Errorf("the original is %+v, %v", again, err)
	}
	if _, err := m.Stop(ctx, "web", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}

	renamed := filepath.Join(filepath.Dir(dir), "renamed")
	if err := os.Rename(dir, renamed); err != nil {
		t.Fatal(err)
	}
	r := openDir(t, config, renamed)
	if resized, err := r.Resize(ctx, "web", smolvm.ResizeOptions{DiskSizeMiB: 20 << 10}); err != nil || resized.Config.DiskSizeMiB != 20<<10 {
		t.Errorf("resize: %+v, %v", resized.Config, err)
	}
	if _, err := r.Resize(ctx, "web", smolvm.ResizeOptions{DiskSizeMiB: 10 << 10}); err == nil || !strings.Contains(err.Error(), "can't be made smaller") {
		t.Errorf("resize to less: %v", err)
	}
	if _, err := r.Start(ctx, "web", smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, r, "web", "cat /root/k"); got != "precious" {
		t.Errorf("after a rename the VM says %q", got)
	}
	if got, err := strconv.Atoi(sh(t, r, "web", "df -m / | awk 'END { print $2 }'")); err != nil || got < 19<<10 || got > 20<<10 {
		t.Errorf("the file system has %d MiB (%v) after the disk was made one of 20 GiB", got, err)
	}
	if _, err := r.Resize(ctx, "web", smolvm.ResizeOptions{DiskSizeMiB: 30 << 10}); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("resize of a VM that runs: %v", err)
	}
	if _, err := r.Stop(ctx, "web", smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}

	disk := filepath.Join(renamed, "disks", "web.qcow2")
	if err := os.Rename(disk, disk+".away"); err != nil {
		t.Fatal(err)
	}
	_, err = r.Start(ctx, "web", smolvm.StartOptions{})
	if err == nil || !strings.Contains(err.Error(), disk+" is missing") {
		t.Errorf("start without a disk: %v", err)
	}
	if _, err := os.Lstat(disk); err == nil {
		t.Error("a disk that was missing was made anew")
	}
	if after, err := r.Get(ctx, "web"); err != nil || after.State != smolvm.StateStopped {
		t.Errorf("after that the VM is %s, %v", after.State, err)
	}
	if err := os.Rename(disk+".away", disk); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(renamed, dir); err != nil {
		t.Fatal(err)
	}
}
