package manager_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/registrytest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// An image needs nothing but its program: no shell, no C library, no directory. What it says of
// the program is obeyed in a VM that boots as in one that is a clone.
func TestImageFromRegistry(t *testing.T) {
	t.Parallel()
	m := openFast(t)
	ctx := t.Context()
	ref := registrytest.New(t).Host + "/scratch"
	program := testenv.Build(t, "github.com/smolvm/smolvm/internal/testenv/sayargs")
	registrytest.Push(t, ref, map[string]string{"sayargs": string(program)}, v1.Config{
		Entrypoint: []string{"/sayargs", "one"}, Cmd: []string{"two"}, Env: []string{"GREETING=hello", "PATH=/"}, User: "1000:50", WorkingDir: "/proc",
		StopSignal: "SIGUSR1", ExposedPorts: map[string]struct{}{"80/tcp": {}}, Labels: map[string]string{"org.example.kind": "test"},
	})
	config := smolvm.VMConfig{Image: ref}
	for name, test := range map[string]struct {
		config  smolvm.VMConfig
		command smolvm.Command
		want    string
	}{
		"as it is":   {config, smolvm.Command{}, `1000:50 /proc "hello" ["/sayargs" "one" "two"]`},
		"arguments":  {config, smolvm.Command{Args: []string{"three"}}, `1000:50 /proc "hello" ["/sayargs" "one" "three"]`},
		"overridden": {smolvm.VMConfig{Image: ref, Entrypoint: []string{"sayargs"}, User: "7", WorkingDir: "/", Env: map[string]string{"GREETING": "bye"}}, smolvm.Command{}, `7:0 / "bye" ["sayargs"]`},
	} {
		result, err := m.Run(ctx, test.config, test.command)
		if got := strings.TrimSpace(string(result.Stdout)); err != nil || got != test.want {
			t.Errorf("%s: it says %q (%s, %v), want %q", name, got, result.Stderr, err, test.want)
		}
	}
	// What is executed in it later has its user, directory and environment, and not its
	// entrypoint.
	awaitTemplates(t, m)
	vm := mustRun(t, m, smolvm.VMConfig{ID: "clone", Image: ref, PublishAll: true})
	forwards, err := m.PortForwards(ctx, vm.ID)
	if err != nil || len(forwards) != 1 || forwards[0].GuestPort != 80 || forwards[0].HostPort == 0 || vm.Config.Labels["org.example.kind"] != "test" {
		t.Errorf("its forwards and labels are %v, %v, %v", forwards, err, vm.Config.Labels)
	}
	if vm.Start == nil || vm.Start.Method != smolvm.StartClone {
		t.Errorf("it was started by %+v", vm.Start)
	}
	var out bytes.Buffer
	if _, err := m.Exec(ctx, vm.ID, smolvm.Command{Args: []string{"sayargs"}, Stdout: &out}); err != nil || out.String() != `1000:50 /proc "hello" ["sayargs"]`+"\n" {
		t.Errorf("executed it says %q, %v", out.String(), err)
	}
	stopBySignal(t, m, vm.ID)
	if err := m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := m.RemoveImage(ctx, ref); err != nil {
		t.Error(err)
	}
	if _, err := m.Image(ctx, vm.Image); !errors.Is(err, smolvm.ErrImageNotFound) {
		t.Errorf("the bootable image is there still: %v", err)
	}
}

// stopBySignal stops a VM, and checks that its program gets the signal that the image asks for.
func stopBySignal(t *testing.T, m *manager.Manager, id string) {
	t.Helper()
	output, to := io.Pipe()
	process, err := m.StartProcess(t.Context(), id, smolvm.Command{Args: []string{"sayargs", "wait"}, User: "0", Stdout: to})
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); err != nil || line != "waiting\n" {
		t.Fatalf("it says %q, %v", line, err)
	}
	if _, err := m.Stop(t.Context(), id, smolvm.StopOptions{Timeout: time.Minute}); err != nil {
		t.Fatal(err)
	}
	_ = output.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, _ = process.Wait(ctx)
	logs, err := m.Logs(t.Context(), id, smolvm.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(logs)
	if err := errors.Join(err, logs.Close()); err != nil || !bytes.Contains(text, []byte("got signal: user defined signal 1")) {
		t.Errorf("the console has %q, %v", text, err)
	}
}
