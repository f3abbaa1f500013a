package manager_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/manager"
)

// said runs a line of a shell in a VM, and returns what it wrote.
func said(t *testing.T, m *manager.Manager, id, line string) string {
	t.Helper()
	var out, said strings.Builder
	status, err := m.Exec(t.Context(), id, smolvm.Command{Args: []string{"sh", "-ec", line}, Stdout: &out, Stderr: &said})
	if err != nil || !status.Success() {
		t.Fatalf("%s: %s, %v\n%s%s", line, status, err, out.String(), said.String())
	}
	return out.String()
}

// layersOf returns the layers of an OCI image.
func layersOf(t *testing.T, m *manager.Manager, name string) []ocistore.Layer {
	t.Helper()
	ref, err := ociref.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	image, err := m.OCI().Get(ref)
	if err != nil {
		t.Fatal(err)
	}
	return image.Layers
}

// What was changed in a VM is in the image that is made of it, and nothing of the VM's own: of a
// VM that runs, and of one that does not; of an image without layers, and of one with them.
func TestCommitImage(t *testing.T) {
	t.Parallel()
	m := openFast(t)
	ctx := t.Context()
	look := `stat -c '%a %u:%g %h %n' /opt/su /opt/same /opt/d /opt/fifo; readlink /opt/link; cat /opt/text; test ! -e /bin/vi`
	want := "6755 7:8 2 /opt/su\n6755 7:8 2 /opt/same\n1770 0:9 2 /opt/d\n644 0:0 1 /opt/fifo\nnowhere\ntext\n"

	first := mustRun(t, m, smolvm.VMConfig{ID: "first", Hostname: "secret-name"})
	said(t, m, first.ID, `mkdir -p /opt/d; echo su > /opt/su; chown 7:8 /opt/su; chmod 6755 /opt/su; ln /opt/su /opt/same; chown 0:9 /opt/d; chmod 1770 /opt/d
		mkfifo /opt/fifo; ln -s nowhere /opt/link; echo text > /opt/text; rm /bin/vi; echo x > /run/x; echo x > /tmp/x
		(i=0; while :; do i=$((i+1)); echo $i > /tmp/count; done) > /dev/null 2>&1 &`)
	made, err := m.CommitImage(ctx, first.ID, "app:1", smolvm.CommitOptions{Message: "first", Author: "me"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(made.Names, "app:1") || len(layersOf(t, m, "app:1")) != 1 {
		t.Errorf("it is %+v", made)
	}
	// What was held goes on.
	said(t, m, first.ID, `old=$(cat /tmp/count); for i in $(seq 1000); do test "$old" = "$(cat /tmp/count)" || exit 0; done; exit 1`)
	if err := m.Delete(ctx, first.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}

	second := mustRun(t, m, smolvm.VMConfig{ID: "second", Image: "app:1"})
	if got := said(t, m, second.ID, look); got != want {
		t.Errorf("the image has\n%s\nwant\n%s", got, want)
	}
	said(t, m, second.ID, `test ! -e /run/x; cat /tmp/x; ! grep -r secret-name /etc; echo more > /opt/more; rm /opt/text; echo text > /opt/text`)
	if _, err := m.Stop(ctx, second.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CommitImage(ctx, second.ID, "app:2", smolvm.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	if vm, err := m.Get(ctx, second.ID); err != nil || vm.State != smolvm.StateStopped {
		t.Errorf("it is %s, %v", vm.State, err)
	}
	layers := layersOf(t, m, "app:2")
	if len(layers) != 2 || layers[0] != layersOf(t, m, "app:1")[0] || layers[1].Size > 4<<10 {
		t.Errorf("its layers are %+v", layers)
	}
	if err := m.Delete(ctx, second.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, method := range []smolvm.StartMethod{smolvm.StartBoot, smolvm.StartClone} {
		vm := mustRun(t, m, smolvm.VMConfig{ID: "third-" + string(method), Image: "app:2"})
		startReport(t, vm, method)
		if got := said(t, m, vm.ID, look+"; cat /opt/more"); got != want+"more\n" {
			t.Errorf("%s: the image has\n%s\nwant\n%s", method, got, want)
		}
		awaitTemplates(t, m)
	}
}

func TestCommitImageRefused(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	if _, err := m.CommitImage(t.Context(), "none", "app", smolvm.CommitOptions{}); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("of no VM: %v", err)
	}
	for _, name := range []string{"UPPER", "app@sha256:" + strings.Repeat("a", 64), "a b"} {
		if _, err := m.CommitImage(t.Context(), "none", name, smolvm.CommitOptions{}); err == nil || errors.Is(err, smolvm.ErrVMNotFound) {
			t.Errorf("as %q: %v", name, err)
		}
	}
}
