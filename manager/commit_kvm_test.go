package manager_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// An image of layers is booted by Firecracker, and cloned: here that of a VM, of which one layer
// has everything.
func TestImageByFirecracker(t *testing.T) {
	testenv.RequireKVM(t)
	config := useReal(t)
	config.Backend, config.Templates = "firecracker", manager.TemplateConfig{}
	m := openAt(t, config)
	ctx := t.Context()
	run := func(id, image string, mounts ...smolvm.Mount) smolvm.VMInfo {
		mustCreate(t, m, smolvm.VMConfig{ID: id, Image: image, MemoryMiB: 256, Mounts: mounts})
		vm, err := m.Start(ctx, id, smolvm.StartOptions{Timeout: kvmBootTimeout})
		if err != nil {
			t.Fatal(err)
		}
		return vm
	}
	origin := run("origin", "")
	sh(t, m, origin.ID, "mkdir /srv; echo page > /srv/page; chown 1000:50 /srv/page; chmod 4755 /srv/page")
	if _, err := m.CommitImage(ctx, origin.ID, "app:1", smolvm.CommitOptions{Changes: []string{"WORKDIR /srv", "ENV COLOR=red"}}); err != nil {
		t.Fatal(err)
	}
	if err := m.Delete(ctx, origin.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	check := func(vm smolvm.VMInfo, how smolvm.StartMethod) {
		t.Helper()
		var out bytes.Buffer
		status, err := m.Exec(ctx, vm.ID, smolvm.Command{
			Args: []string{"sh", "-c", `cat page; stat -c "%a %u:%g" page; echo $COLOR`}, Stdout: &out, Stderr: &out,
		})
		if want := "page\n4755 1000:50\nred\n"; err != nil || !status.Success() || out.String() != want {
			t.Errorf("a VM by %s says %q (%s, %v), want %q", how, out.String(), status, err, want)
		}
		if vm.Backend != "firecracker" || vm.Start == nil || vm.Start.Method != how {
			t.Errorf("it runs on %s, and was started by %+v, want %s", vm.Backend, vm.Start, how)
		}
	}
	check(run("first", "app:1"), smolvm.StartBoot)
	if _, err := m.BuildTemplate(ctx, smolvm.TemplateOptions{Image: "app:1", MemoryMiB: 256, Timeout: kvmBootTimeout}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	check(run("second", "app:1", smolvm.Mount{Source: dir, Target: "/project"}), smolvm.StartClone)
	// And the clone has a directory of the host.
	sh(t, m, "second", "cp /srv/page /project/copy && mv /project/copy /project/page")
	if got, err := os.ReadFile(filepath.Join(dir, "page")); err != nil || string(got) != "page\n" {
		t.Errorf("in the directory of the host is %q, %v", got, err)
	}
}
