package manager_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// Handles see what becomes of a VM, whoever does it.
func TestWatchAndWait(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	if _, err := m.VM("nobody").Info(t.Context()); smolvm.CodeOf(err) != smolvm.CodeVMNotFound {
		t.Errorf("a handle of no VM: %v", err)
	}
	handleWait(t, m, m.VM(mustRun(t, m, smolvm.VMConfig{}).ID))
}

// Waiting for the end of a VM ends with it, also where nobody has written that down, and with
// the VM itself.
func TestWaitForDeadShim(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	type ended struct {
		vm  smolvm.VMInfo
		err error
	}
	wait := func(id string, states ...smolvm.VMState) <-chan ended {
		waited := make(chan ended, 1)
		go func() {
			vm, err := m.Wait(t.Context(), id, states...)
			waited <- ended{vm, err}
		}()
		return waited
	}
	for name, test := range map[string]struct {
		config smolvm.VMConfig
		victim func(vm smolvm.VMInfo) int // nil: it ends by itself
		state  smolvm.VMState
	}{
		"shim is killed":   {smolvm.VMConfig{}, func(vm smolvm.VMInfo) int { return vm.ShimPID }, smolvm.StateError},
		"VMM is killed":    {smolvm.VMConfig{}, func(vm smolvm.VMInfo) int { return vm.PID }, smolvm.StateError},
		"its time is over": {smolvm.VMConfig{TTL: 100 * time.Millisecond}, nil, smolvm.StateStopped},
	} {
		vm := mustRun(t, m, test.config)
		waited := wait(vm.ID)
		if test.victim != nil {
			if err := syscall.Kill(test.victim(vm), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		if got := <-waited; got.err != nil || got.vm.State != test.state {
			t.Errorf("%s: it is %q, %v", name, got.vm.State, got.err)
		}
	}
	vm := mustCreate(t, m, smolvm.VMConfig{})
	waited := wait(vm.ID, smolvm.StateRunning)
	if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := <-waited; !errors.Is(got.err, smolvm.ErrVMNotFound) {
		t.Errorf("waiting for a VM that is deleted: %v", got.err)
	}
}

// Events of another process are seen too, from the first one on.
func TestWatchFromTheBeginning(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	mustCreate(t, m, smolvm.VMConfig{ID: "earlier"})
	other, err := manager.Open(t.Context(), manager.Config{DataDir: m.DataDir(), SocketDir: m.SocketDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	count := 0
	for event, err := range other.Watch(t.Context(), smolvm.WatchOptions{After: -1}) {
		if err != nil {
			t.Fatal(err)
		}
		if count++; event.Action == "create" && event.VMID == "later" {
			break
		}
		if count == 1 {
			mustCreate(t, m, smolvm.VMConfig{ID: "later"})
		}
	}
	if events, err := m.Events(t.Context(), smolvm.EventOptions{Limit: 1000}); err != nil || len(events) != count {
		t.Errorf("%d events were seen, of %d, %v", count, len(events), err)
	}
}

func handleOutput(t *testing.T, vm smolvm.VM) {
	out, err := vm.Output(t.Context(), "echo", "a b", "c")
	if err != nil || string(out) != "a b c\n" {
		t.Errorf("output is %q, %v", out, err)
	}
	out, err = vm.Output(t.Context(), "sh", "-c", "echo out; echo wrong >&2; exit 3")
	failed, ok := errors.AsType[*smolvm.ExitError](err)
	if !ok || failed.Code != 3 || string(failed.Stderr) != "wrong\n" || string(out) != "out\n" || !strings.Contains(err.Error(), vm.ID) {
		t.Errorf("a command that fails: %q, %v", out, err)
	}
	if _, err := vm.Output(t.Context(), "yes"); !errors.Is(err, smolvm.ErrOutputLimit) {
		t.Errorf("a command that writes without end: %v", err)
	}
}

func handleProcess(t *testing.T, vm smolvm.VM) {
	ctx := t.Context()
	var out bytes.Buffer
	process, err := vm.StartProcess(ctx, smolvm.Command{Args: []string{"sh", "-c", "echo $$; exec sleep 6011"}, Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	name, err := vm.ReadFile(ctx, fmt.Sprintf("/proc/%d/comm", process.PID()))
	if err != nil || process.PID() < 2 {
		t.Errorf("process %d of the guest is %q, %v", process.PID(), name, err)
	}
	brief, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := process.Wait(brief); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a process that runs: %v", err)
	}
	if err := process.Signal(ctx, "NOSUCH"); smolvm.CodeOf(err) != smolvm.CodeInvalid {
		t.Errorf("signal NOSUCH: %v", err)
	}
	if err := process.Signal(ctx, smolvm.SignalTerminate); err != nil {
		t.Error(err)
	}
	for range 2 {
		if status, err := process.Wait(ctx); err != nil || status.Signal != "TERM" {
			t.Errorf("a process that was sent TERM: %v, %v", status, err)
		}
	}
	if got, want := out.String(), strconv.Itoa(process.PID())+"\n"; got != want {
		t.Errorf("its id is %q by its own word, %q by ours", got, want)
	}
	if err := process.Signal(ctx, smolvm.SignalKill); err != nil {
		t.Errorf("a signal to a process that has ended: %v", err)
	}

	var screen bytes.Buffer
	process, err = vm.StartProcess(ctx, smolvm.Command{
		Args: []string{"sh", "-c", `trap 'stty size; exit' WINCH; while :; do sleep 0.1; done`}, TTY: &smolvm.TTY{}, Stdout: &screen,
	})
	if err != nil {
		t.Fatal(err)
	}
	var status smolvm.ExitStatus
	for size := 50; ; size++ { // the shell may not have set its trap yet
		if err := process.Resize(ctx, smolvm.WindowSize{Columns: 132, Rows: size}); err != nil {
			t.Fatal(err)
		}
		brief, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		status, err = process.Wait(brief)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			break
		}
	}
	if err != nil || !status.Success() || !strings.Contains(screen.String(), " 132") {
		t.Errorf("a terminal that was resized: %q, %v, %v", screen.String(), status, err)
	}

	process, err = vm.StartProcess(ctx, smolvm.Command{Args: []string{"nosuch"}})
	if err != nil || process.PID() != 0 {
		t.Fatalf("a command that is not there: %v", err)
	}
	if status, err := process.Wait(ctx); err != nil || status.Code != 127 {
		t.Errorf("a command that is not there: %v, %v", status, err)
	}
}

func handleFiles(t *testing.T, vm smolvm.VM) {
	ctx := t.Context()
	for name, content := range map[string][]byte{
		"/root/empty": {}, "/root/a name": []byte("a\x00b\n"), "relative": bytes.Repeat([]byte("0123456789abcdef"), 10_000),
		"/root/" + strings.Repeat("n", 200): []byte("long"),
	} {
		if err := vm.WriteFile(ctx, name, content, smolvm.WriteOptions{Mode: 0o600}); err != nil {
			t.Errorf("write %q: %v", name, err)
		}
		if got, err := vm.ReadFile(ctx, name); err != nil || !bytes.Equal(got, content) {
			t.Errorf("read %q: %d bytes of %d, %v", name, len(got), len(content), err)
		}
	}
	setup := "cd /root && mkdir -p d/e && ln -sf d/e/../file way && echo one > d/file && ln -sf /root/way absolute && ln -sf loop loop && stat -c %a empty"
	if out, err := vm.Output(ctx, "sh", "-c", setup); err != nil || string(out) != "600\n" {
		t.Fatalf("%q, %v", out, err)
	}
	if got, err := vm.ReadFile(ctx, "/root/absolute"); err != nil || string(got) != "one\n" {
		t.Errorf("read through two links: %q, %v", got, err)
	}
	for name, read := range map[string]func() error{
		"directory": func() error { _, err := vm.ReadFile(ctx, "/root/d"); return err },
		"loop":      func() error { _, err := vm.ReadFile(ctx, "/root/loop"); return err },
		"write dir": func() error { return vm.WriteFile(ctx, "/root/", nil, smolvm.WriteOptions{}) },
		"no parent": func() error { return vm.WriteFile(ctx, "/nosuch/file", nil, smolvm.WriteOptions{}) },
	} {
		if err := read(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := vm.ReadFile(ctx, "/root/nosuch"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := vm.GetTree(ctx, "/root/nosuch", smolvm.CopyOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tree that is not there: %v", err)
	}
	if _, err := vm.Output(ctx, "dd", "if=/dev/zero", "of=/root/huge", "bs=1M", "count=0", "seek=100"); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.ReadFile(ctx, "/root/huge"); !errors.Is(err, smolvm.ErrCopyLimit) {
		t.Errorf("a file of 100 MiB: %v", err)
	}
}

// handleWait ends the VM.
func handleWait(t *testing.T, m *manager.Manager, vm smolvm.VM) {
	ctx := t.Context()
	if info, err := vm.Wait(ctx, smolvm.StateRunning); err != nil || info.State != smolvm.StateRunning {
		t.Errorf("waiting for what is so: %v, %v", info.State, err)
	}
	actions := make(chan string, 100)
	watched := make(chan error, 1)
	started := make(chan struct{})
	go func() {
		events, err := m.Events(ctx, smolvm.EventOptions{VM: vm.ID, Limit: 1})
		close(started)
		for event, watchErr := range m.Watch(ctx, smolvm.WatchOptions{VM: vm.ID, After: events[0].ID}) {
			if err = watchErr; err != nil {
				break
			}
			actions <- event.Action
			if event.Action == "stop" {
				break
			}
		}
		watched <- err
	}()
	<-started
	waited := make(chan error, 1)
	go func() {
		info, err := vm.Wait(ctx)
		if err == nil && info.State != smolvm.StateStopped {
			err = fmt.Errorf("it is %s", info.State)
		}
		waited <- err
	}()
	if _, err := vm.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.Stop(ctx, smolvm.StopOptions{Kill: true}); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Errorf("waiting for the end: %v", err)
	}
	if err := <-watched; err != nil {
		t.Errorf("watch: %v", err)
	}
	close(actions)
	var seen []string
	for action := range actions {
		seen = append(seen, action)
	}
	if got := strings.Join(seen, " "); got != "pause resume exit stop" {
		t.Errorf("events are %q", got)
	}
	brief, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := vm.Wait(brief, smolvm.StateRunning); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for what does not come: %v", err)
	}
	for _, err := range m.Watch(brief, smolvm.WatchOptions{}) {
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("watching past the end of a context: %v", err)
		}
	}
}

// Create with Reuse is idempotent: it returns the VM that is there, if it is the one that is
// asked for.
func TestCreateReuse(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	config := smolvm.VMConfig{ID: "web", MemoryMiB: 256, PortForwards: []smolvm.PortForward{{GuestPort: 80}}, Labels: map[string]string{"a": "b"}}
	first := mustCreate(t, m, config)
	if _, err := m.Create(t.Context(), config, smolvm.CreateOptions{}); !errors.Is(err, smolvm.ErrVMAlreadyExists) {
		t.Errorf("create without Reuse: %v", err)
	}
	again, err := m.Create(t.Context(), config, smolvm.CreateOptions{Reuse: true})
	if err != nil || again.CreatedAt != first.CreatedAt {
		t.Errorf("create again: %+v, %v", again, err)
	}
	config.MemoryMiB, config.Labels = 512, nil
	_, err = m.Create(t.Context(), config, smolvm.CreateOptions{Reuse: true})
	if !errors.Is(err, smolvm.ErrVMAlreadyExists) || !strings.Contains(fmt.Sprint(err), "labels, memory_mib differ") {
		t.Errorf("create with another configuration: %v", err)
	}
	if err := m.Delete(t.Context(), "web", smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

func TestBackends(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	backends, err := m.Backends(t.Context())
	byName := map[string]smolvm.BackendInfo{}
	for _, backend := range backends {
		byName[backend.Name] = backend
	}
	if qemu := byName["qemu"]; err != nil || !qemu.Available || qemu.Why != "" {
		t.Errorf("backends are %+v, %v", backends, err)
	}
	if other := byName["firecracker"]; other.Available == (other.Why != "") {
		t.Errorf("backends are %+v", backends)
	}
	for _, backend := range []string{"auto", "qemu"} {
		if vm := mustCreate(t, m, smolvm.VMConfig{Backend: backend}); vm.Backend != "qemu" {
			t.Errorf("backend %q is %q", backend, vm.Backend)
		}
	}
}

// A VM of a backend that nobody knows is refused before anything of it is made.
func TestUnknownBackend(t *testing.T) {
	m := openFake(t)
	for _, backend := range []string{"virtualbox", "xen"} {
		_, err := m.Create(t.Context(), smolvm.VMConfig{ID: "web", Backend: backend}, smolvm.CreateOptions{})
		if !errors.Is(err, smolvm.ErrUnknownBackend) || !strings.Contains(smolvm.HintOf(err), "auto, firecracker, qemu") {
			t.Errorf("create with backend %q: %v, hint %q", backend, err, smolvm.HintOf(err))
		}
		if invalid, ok := errors.AsType[*smolvm.ValidationError](err); !ok || invalid.Fields[0].Field != "backend" {
			t.Errorf("create with backend %q: %v is not about that field", backend, err)
		}
		if _, err := m.CheckPrerequisites(t.Context(), backend); !errors.Is(err, smolvm.ErrUnknownBackend) {
			t.Errorf("look at backend %q: %v", backend, err)
		}
	}
	if vms, err := m.List(t.Context(), smolvm.ListOptions{}); err != nil || len(vms) > 0 {
		t.Errorf("there are VMs: %+v, %v", vms, err)
	}
	for _, dir := range []string{"disks", "vms"} {
		if left, _ := os.ReadDir(filepath.Join(m.DataDir(), dir)); len(left) > 0 {
			t.Errorf("left in %s: %v", dir, left)
		}
	}
}

// On a host that can run no VMs a Manager can be opened all the same, and "auto" says what
// each backend lacks.
func TestAutoWithoutVMM(t *testing.T) {
	config := useFake(t)
	config.Backend = "auto"
	t.Setenv("PATH", t.TempDir())
	m := openAt(t, config)
	_, err := m.Create(t.Context(), smolvm.VMConfig{}, smolvm.CreateOptions{})
	missing, ok := errors.AsType[*smolvm.PrerequisiteError](err)
	if !ok || missing.Backend != "auto" || !strings.Contains(err.Error(), "backend qemu: runs the VMs") {
		t.Errorf("create: %v", err)
	}
	if got := m.Backend(); got != "qemu" {
		t.Errorf("the backend is %q", got)
	}
	backends, err := m.Backends(t.Context())
	if err != nil || backends[0].Available || !strings.Contains(backends[0].Why, missing.Findings[0].String()) {
		t.Errorf("backends are %+v, %v; \"auto\" says %+v", backends, err, missing)
	}
}

// Of a backend that runs VMMs in namespaces a user hears whether those can be made, and if not,
// what to do.
func TestNamespacesChecked(t *testing.T) {
	m := openFake(t)
	for backend, want := range map[string]bool{"firecracker": true, "qemu": false} {
		findings, err := m.CheckPrerequisites(t.Context(), backend)
		if err != nil {
			t.Fatal(err)
		}
		at := slices.IndexFunc(findings, func(f smolvm.Finding) bool { return f.Name == "namespaces" })
		if (at >= 0) != want {
			t.Errorf("backend %s: findings are %+v", backend, findings)
		}
		if at >= 0 && findings[at].Severity != smolvm.SeverityOK && findings[at].Fix == "" {
			t.Errorf("backend %s: %+v has no way out", backend, findings[at])
		}
		if at >= 0 {
			t.Log(findings[at])
		}
	}
}
