package manager_test

import (
	"archive/tar"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
	"github.com/smolvm/smolvm/internal/image/ocistore"
	"github.com/smolvm/smolvm/internal/workspace"
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

// checkCapable fails unless a layer has the file with its capability, and with the mode that it
// was given.
func checkCapable(t *testing.T, m *manager.Manager, layer ocistore.Layer) {
	t.Helper()
	file, err := m.OCI().OpenLayer(layer)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	unpacked, err := zstd.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	defer unpacked.Close()
	for r := tar.NewReader(unpacked); ; {
		header, err := r.Next()
		if err != nil {
			t.Fatalf("it is not in the layer: %v", err)
		}
		if header.Name != "opt/capable" {
			continue
		}
		for name, value := range capable() {
			if header.PAXRecords[name] != value || header.Mode != 0o700 {
				t.Errorf("it is %+v", header)
			}
		}
		return
	}
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

	// On a layer with what no program of the guest can make: a file with a capability.
	ref, err := ociref.Parse("capable")
	if err != nil {
		t.Fatal(err)
	}
	above, err := m.OCI().AddLayer(ctx, tarOf(t, &tar.Header{Typeflag: tar.TypeReg, Name: "opt/capable", Mode: 0o755, Size: 3, PAXRecords: capable()}))
	if err == nil {
		_, err = m.OCI().AddImage(ctx, ref, []byte(`{}`), append(layersOf(t, m, "app:1"), above))
	}
	if err != nil {
		t.Fatal(err)
	}
	second := mustRun(t, m, smolvm.VMConfig{ID: "second", Image: "capable"})
	if got := said(t, m, second.ID, look); got != want {
		t.Errorf("the image has\n%s\nwant\n%s", got, want)
	}
	said(t, m, second.ID, `test ! -e /run/x; cat /tmp/x; ! grep -r secret-name /etc; echo more > /opt/more; chmod 700 /opt/capable; rm /opt/text; echo text > /opt/text`)
	if _, err := m.Stop(ctx, second.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CommitImage(ctx, second.ID, "app:2", smolvm.CommitOptions{Changes: []string{"ENV COLOR=red", "WORKDIR /opt"}}); err != nil {
		t.Fatal(err)
	}
	if vm, err := m.Get(ctx, second.ID); err != nil || vm.State != smolvm.StateStopped {
		t.Errorf("it is %s, %v", vm.State, err)
	}
	layers := layersOf(t, m, "app:2")
	if len(layers) != 3 || layers[0] != layersOf(t, m, "app:1")[0] || layers[2].Size > 4<<10 {
		t.Fatalf("its layers are %+v", layers)
	}
	checkCapable(t, m, layers[2])
	if err := m.Delete(ctx, second.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, method := range []smolvm.StartMethod{smolvm.StartBoot, smolvm.StartClone} {
		vm := mustRun(t, m, smolvm.VMConfig{ID: "third-" + string(method), Image: "app:2"})
		startReport(t, vm, method)
		if got := said(t, m, vm.ID, look+"; cat more; echo $COLOR"); got != want+"more\nred\n" {
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
	for _, name := range []string{"UPPER", "base", "python", "app@sha256:" + strings.Repeat("a", 64), "a b"} {
		if _, err := m.CommitImage(t.Context(), "none", name, smolvm.CommitOptions{}); err == nil || errors.Is(err, smolvm.ErrVMNotFound) {
			t.Errorf("as %q: %v", name, err)
		}
	}
	vm := mustRun(t, m, smolvm.VMConfig{ID: "paused"})
	if _, err := m.Pause(t.Context(), vm.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CommitImage(t.Context(), vm.ID, "app", smolvm.CommitOptions{}); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("of a paused VM: %v", err)
	}
	if images, err := m.OCI().List(); err != nil || len(images) > 0 {
		t.Errorf("there are %+v, %v", images, err)
	}
}

// An agent of an earlier build, as in a snapshot, refuses what it does not know, and what to do is
// said.
func TestWorkspaceOfEarlierAgent(t *testing.T) {
	t.Parallel()
	w := openWorkspace(t, openFake(t), workspace.Options{})
	for name, err := range map[string]error{
		"a layer": w.Layer(t.Context(), io.Discard),
		"a step":  second(w.Run(t.Context(), workspace.Command{Args: []string{"true"}})),
	} {
		if err == nil || !strings.Contains(err.Error(), "earlier version of smolvm") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func second(_ smolvm.ExitStatus, err error) error { return err }
