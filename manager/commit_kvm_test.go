package manager_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/registrytest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// Images of layers are booted by Firecracker, and cloned: one of a registry, one of a Dockerfile, and one
// of a VM, of which one layer has everything.
func TestImageByFirecracker(t *testing.T) {
	testenv.RequireKVM(t)
	config := useReal(t)
	config.Backend, config.Templates = "firecracker", manager.TemplateConfig{}
	m := openAt(t, config)
	ctx := t.Context()
	pushed := registrytest.New(t).Host + "/app:1"
	origin := runByFirecracker(t, m, smolvm.VMConfig{})
	sh(t, m, origin.ID, "mkdir /srv; echo page > /srv/page; chown 1000:50 /srv/page; chmod 4755 /srv/page")
	changes := smolvm.CommitOptions{Changes: []string{"WORKDIR /srv", "ENV COLOR=red"}}
	if _, err := m.CommitImage(ctx, origin.ID, pushed, changes); err != nil {
		t.Fatal(err)
	}
	if err := m.PushImage(ctx, pushed, smolvm.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := m.RemoveImage(ctx, pushed); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		what, image, color string
		make               func(ctx context.Context) error
	}{
		{"registry", pushed, "red", func(context.Context) error { return nil }},
		{"Dockerfile", "built", "blue", func(ctx context.Context) error {
			_, err := m.BuildDockerfile(ctx, smolvm.DockerfileOptions{
				DockerfileText: fmt.Appendf(nil, "FROM %s\nENV COLOR=blue\nRUN echo \"$COLOR\" >color\n", pushed),
				Tags:           []string{"built"}, VM: smolvm.VMConfig{MemoryMiB: 256},
			})
			return err
		}},
		{"commit", "committed", "red", func(ctx context.Context) error {
			_, err := m.CommitImage(ctx, origin.ID, "committed", changes)
			return err
		}},
	} {
		t.Run(test.what, func(t *testing.T) {
			if err := test.make(ctx); err != nil {
				t.Fatal(err)
			}
			testImageByFirecracker(t, m, test.image, test.color)
		})
	}
	if got := sh(t, m, "dockerfile-clone", "cat /srv/color"); got != "blue" {
		t.Errorf("the Dockerfile's command wrote %q", got)
	}
}

// testImageByFirecracker tests VMs NAME-boot and NAME-clone of an image.
func testImageByFirecracker(t *testing.T, m *manager.Manager, image, color string) {
	t.Helper()
	check := func(vm smolvm.VMInfo, how smolvm.StartMethod) {
		t.Helper()
		var out bytes.Buffer
		status, err := m.Exec(t.Context(), vm.ID, smolvm.Command{
			Args: []string{"sh", "-c", `cat page; stat -c "%a %u:%g" page; echo $COLOR`}, Stdout: &out, Stderr: &out,
		})
		if want := "page\n4755 1000:50\n" + color + "\n"; err != nil || !status.Success() || out.String() != want {
			t.Errorf("a VM by %s says %q (%s, %v), want %q", how, out.String(), status, err, want)
		}
		if vm.Backend != "firecracker" || vm.Start == nil || vm.Start.Method != how {
			t.Errorf("it runs on %s, and was started by %+v, want %s", vm.Backend, vm.Start, how)
		}
	}
	id := strings.ToLower(filepath.Base(t.Name()))
	check(runByFirecracker(t, m, smolvm.VMConfig{ID: id + "-boot", Image: image}), smolvm.StartBoot)
	if _, err := m.BuildTemplate(t.Context(), smolvm.TemplateOptions{Image: image, MemoryMiB: 256, Timeout: kvmBootTimeout}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	clone := runByFirecracker(t, m, smolvm.VMConfig{ID: id + "-clone", Image: image, Mounts: []smolvm.Mount{{Source: dir, Target: "/project"}}})
	check(clone, smolvm.StartClone)
	// And the clone has a directory of the host.
	sh(t, m, clone.ID, "cp /srv/page /project/copy && mv /project/copy /project/page")
	if got, err := os.ReadFile(filepath.Join(dir, "page")); err != nil || string(got) != "page\n" {
		t.Errorf("in the directory of the host is %q, %v", got, err)
	}
}

// runByFirecracker starts a new VM, with the time that a guest in a guest takes.
func runByFirecracker(t *testing.T, m *manager.Manager, config smolvm.VMConfig) smolvm.VMInfo {
	t.Helper()
	config.MemoryMiB = 256
	created := mustCreate(t, m, config)
	vm, err := m.Start(t.Context(), created.ID, smolvm.StartOptions{Timeout: kvmBootTimeout})
	if err != nil {
		t.Fatal(err)
	}
	return vm
}
