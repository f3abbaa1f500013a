package manager_test

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

// The whole life of one VM, through all of its states.
func TestLifecycle(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	ctx := t.Context()
	vm := mustCreate(t, m, smolvm.VMConfig{
		ID: "life", Env: map[string]string{"GREETING": "hello"}, Hostname: "lively", DiskSizeMiB: 20 << 10,
		PortForwards: []smolvm.PortForward{{HostAddr: ownAddr(t), GuestPort: webPort}},
	})
	if vm.State != smolvm.StateCreated || vm.PID != 0 || vm.Network.SSHHostPort < 2200 || vm.Config.VCPUs != 2 || vm.Config.MemoryMiB != 512 {
		t.Errorf("after create: %+v", vm)
	}
	if _, err := m.Exec(ctx, vm.ID, smolvm.Command{Args: []string{"true"}}); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("exec in a VM that does not run: %v", err)
	}
	if stopped, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{}); err != nil || stopped.State != smolvm.StateCreated {
		t.Errorf("stop of a VM that does not run: %v, %v", stopped.State, err)
	}

	vm, err := m.Start(ctx, vm.ID, smolvm.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if vm.State != smolvm.StateRunning || vm.PID == 0 || vm.ShimPID == 0 || vm.Accelerator == "" || vm.StartedAt.IsZero() {
		t.Errorf("after start: %+v", vm)
	}
	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("second start: %v", err)
	}
	hasUsed(t, m, vm.ID)
	for line, want := range map[string]string{
		"hostname":                             "lively",
		"echo $GREETING":                       "hello",
		"nproc":                                "2",
		"cat /proc/1/comm":                     "init",
		"ip -4 -o addr show eth0 | tr -s ' '":  "2: eth0 inet 10.0.2.15/24 brd 10.0.2.255 scope global eth0",
		"wc -c < /etc/machine-id":              "33",
		"grep -c nameserver /etc/resolv.conf":  "1",
		"ps -o stat | grep -c Z || echo clean": "0\nclean",
		// Larger than the image: the guest has the room.
		"df -m / | awk 'NR==2 {print ($2 > 19000)}'": "1",
	} {
		if got := sh(t, m, vm.ID, line); got != want && !strings.HasPrefix(got, want) {
			t.Errorf("%s printed %q, want %q", line, got, want)
		}
	}
	sh(t, m, vm.ID, "echo kept > /root/file")
	sh(t, m, vm.ID, "mkdir /www && echo page > /www/index.html && httpd -p 8000 -h /www")
	if got := get(t, dialTCP(t, vm.Network.PortForwards[0])); !strings.Contains(got, "page") {
		t.Errorf("by a forward: %q", got)
	}
	conn, err := m.Dial(ctx, vm.ID, "tcp", "127.0.0.1:8000")
	if err != nil {
		t.Fatal(err)
	}
	if got := get(t, conn); !strings.Contains(got, "page") {
		t.Errorf("by Dial: %q", got)
	}

	vm, err = m.Stop(ctx, vm.ID, smolvm.StopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if vm.State != smolvm.StateStopped || vm.PID != 0 || !strings.Contains(vm.Cause, "stopped by request") {
		t.Errorf("after stop: %+v", vm)
	}
	if left := testenv.Processes(m.DataDir()); len(left) > 0 {
		t.Errorf("after stop there are processes: %q", left)
	}

	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, vm.ID, "cat /root/file"); got != "kept" {
		t.Errorf("the disk was not kept over a stop: %q", got)
	}
	if err := m.Delete(ctx, vm.ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Get(ctx, vm.ID); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("get after delete: %v", err)
	}
	events, err := m.Events(ctx, smolvm.EventOptions{VM: vm.ID})
	if err != nil {
		t.Fatal(err)
	}
	var actions []string
	for _, event := range events {
		actions = append(actions, event.Action)
	}
	if got, want := strings.Join(actions, " "), "create start exit stop start exit delete"; got != want {
		t.Errorf("events are %q, want %q", got, want)
	}
}

// Closing a Manager leaves VMs running; another one, as in another process, takes
// them over.
func TestClose(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	config := manager.Config{DataDir: m.DataDir(), SocketDir: m.SocketDir(), Templates: manager.TemplateConfig{Disabled: true}}
	vm := mustRun(t, m, smolvm.VMConfig{})
	first, err := manager.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	if got := sh(t, first, vm.ID, "echo over"); got != "over" {
		t.Errorf("exec printed %q", got)
	}
	for range 2 {
		if err := first.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if got, err := m.Get(t.Context(), vm.ID); err != nil || got.State != smolvm.StateRunning {
		t.Errorf("after another Manager was closed: %v, %v", got.State, err)
	}
}

// A guest may end by itself, in good order or not.
func TestGuestEndsByItself(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	for name, test := range map[string]struct {
		line  string
		state smolvm.VMState
		cause string
	}{
		"power off": {"poweroff", smolvm.StateStopped, "powered off"},
		"reboot":    {"reboot", smolvm.StateStopped, "rebooted"},
		"panic":     {"echo c > /proc/sysrq-trigger", smolvm.StateError, "panicked"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			vm := mustRun(t, m, smolvm.VMConfig{})
			_, _ = m.Exec(t.Context(), vm.ID, smolvm.Command{Args: []string{"sh", "-c", test.line + "; sleep 30"}})
			if err := waitEnd(t, vm); err != nil {
				t.Fatal(err)
			}
			got, err := m.Get(t.Context(), vm.ID)
			if err != nil || got.State != test.state || !strings.Contains(got.Cause, test.cause) {
				t.Errorf("state %s, cause %q (%v); want %s, %q", got.State, got.Cause, err, test.state, test.cause)
			}
			if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
}

// waitEnd waits for the end of a VM's shim.
func waitEnd(t *testing.T, vm smolvm.VMInfo) error {
	t.Helper()
	start, err := proc.StartTime(vm.ShimPID)
	if err != nil {
		return nil //nolint:nilerr // it has ended already
	}
	return proc.Wait(t.Context(), vm.ShimPID, start)
}

// An image may bring an init of its own. The agent then serves beside it, and neither
// differs from what it is on other machines.
func TestOwnInit(t *testing.T) {
	t.Parallel()
	m := openReal(t)
	image, err := m.Image(t.Context(), smolvm.DefaultImage)
	if err != nil {
		t.Fatal(err)
	}
	vm := mustRun(t, m, smolvm.VMConfig{ID: "vm", BootArgs: image.BootArgs + " init=/sbin/init"})
	got := sh(t, m, vm.ID, "cat /proc/1/comm /proc/1/timerslack_ns /proc/self/timerslack_ns; hostname; echo kept > /root/file")
	if want := "init\n50000\n50000\nvm"; got != want {
		t.Errorf("the guest says %q, want %q", got, want)
	}
	stopped, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{})
	if err != nil || stopped.State != smolvm.StateStopped || !strings.Contains(stopped.Cause, "powered off") {
		t.Errorf("stopped: %s, %q, %v", stopped.State, stopped.Cause, err)
	}
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, vm.ID, "cat /root/file"); got != "kept" {
		t.Errorf("after a restart the file says %q", got)
	}
}

// Whoever dies, no VM is without its keeper, and the truth is found out.
func TestKilledProcesses(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	for name, victim := range map[string]func(smolvm.VMInfo) int{
		"shim": func(vm smolvm.VMInfo) int { return vm.ShimPID },
		"VMM":  func(vm smolvm.VMInfo) int { return vm.PID },
	} {
		t.Run(name, func(t *testing.T) {
			vm := mustRun(t, m, smolvm.VMConfig{})
			vmm, err := proc.StartTime(vm.PID)
			if err != nil {
				t.Fatal(err)
			}
			process, err := os.FindProcess(victim(vm))
			if err != nil {
				t.Fatal(err)
			}
			shimEnd := make(chan error, 1)
			go func() { shimEnd <- waitEnd(t, vm) }()
			if err := process.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(<-shimEnd, proc.Wait(t.Context(), vm.PID, vmm)); err != nil {
				t.Fatal(err)
			}
			// Whoever has found out.
			for _, want := range []int{1, 0} {
				dead, err := m.Reconcile(t.Context())
				if err != nil || len(dead) != want || want == 1 && dead[0] != vm.ID {
					t.Errorf("Reconcile = %q, %v", dead, err)
				}
			}
			got, err := m.Get(t.Context(), vm.ID)
			if err != nil || got.State != smolvm.StateError || got.Cause == "" {
				t.Errorf("state %s, cause %q, %v", got.State, got.Cause, err)
			}
			if _, err := os.Stat(vm.SocketPath); !os.IsNotExist(err) {
				t.Errorf("the socket is still there: %v", err)
			}
			if err := m.Delete(t.Context(), vm.ID, smolvm.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTTLAndEphemeral(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustRun(t, m, smolvm.VMConfig{TTL: time.Second, Ephemeral: true})
	if err := waitEnd(t, vm); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Get(t.Context(), vm.ID); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("an ephemeral VM whose time is over: %v", err)
	}
	events, err := m.Events(t.Context(), smolvm.EventOptions{VM: vm.ID})
	if err != nil || len(events) < 2 || !strings.Contains(events[len(events)-2].Detail, "time to live") {
		t.Errorf("events %+v, %v", events, err)
	}
	// Stopping one deletes it as well.
	vm = mustRun(t, m, smolvm.VMConfig{Ephemeral: true})
	if _, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Get(t.Context(), vm.ID); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("an ephemeral VM after its stop: %v", err)
	}
}

func TestLogs(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustCreate(t, m, smolvm.VMConfig{})
	read := func(opts smolvm.LogOptions) string {
		t.Helper()
		log, err := m.Logs(t.Context(), vm.ID, opts)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = log.Close() }()
		var text bytes.Buffer
		if _, err := text.ReadFrom(log); err != nil {
			t.Fatal(err)
		}
		return text.String()
	}
	if got := read(smolvm.LogOptions{}); got != "" {
		t.Errorf("the log of a VM that was never started is %q", got)
	}
	if _, err := m.Start(t.Context(), vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	followed := make(chan string, 1)
	log, err := m.Logs(t.Context(), vm.ID, smolvm.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		var text bytes.Buffer
		_, _ = text.ReadFrom(log)
		followed <- text.String()
	}()
	sh(t, m, vm.ID, "for i in one two three; do echo line $i > /dev/console; done")
	if _, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := <-followed; !strings.Contains(got, "line one") || !strings.Contains(got, "line three") {
		t.Errorf("followed %q", got)
	}
	if err := log.Close(); err != nil {
		t.Error(err)
	}
	all := read(smolvm.LogOptions{})
	lines := strings.SplitAfter(strings.TrimSuffix(all, "\n"), "\n")
	if got, want := read(smolvm.LogOptions{Tail: 2}), strings.Join(lines[len(lines)-2:], ""); strings.TrimSuffix(got, "\n") != want {
		t.Errorf("tail is %q, want %q", got, want)
	}
	if got := read(smolvm.LogOptions{Tail: 10000}); got != all {
		t.Errorf("a tail longer than the log is %q", got)
	}
}
