package firecracker_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/namespace/namespacetest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
	"github.com/smolvm/smolvm/internal/vmm/firecracker"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/firecrackerfake"
	"github.com/smolvm/smolvm/internal/vmm/vmmtest"
)

func TestMain(m *testing.M) {
	namespacetest.Main()
	if len(os.Args) > 2 && os.Args[1] == firecrackerfake.Command {
		os.Exit(firecrackerfake.Main(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == vmmtest.RelayCommand {
		fmt.Fprintln(os.Stderr, vmmtest.Relay())
		os.Exit(1)
	}
	os.Exit(testenv.Main(m.Run))
}

// patience is how long a test waits for what must come in the end.
const patience = time.Minute

// room is what one test needs to start fake Firecrackers.
type room struct {
	*testing.T
	dir string
}

func newRoom(t *testing.T) *room {
	t.Helper()
	r := &room{t, t.TempDir()}
	// What a Firecracker is told are names, so it is its program that tells whose it is.
	testenv.NoProcesses(t, r.dir)
	return r
}

// config is that of a VM with two drives and a channel.
func (r *room) config(b firecrackerfake.Behaviour, edit func(*vmm.Config)) vmm.Config {
	r.Helper()
	file := func(name, text string) string {
		path := filepath.Join(r.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			r.Fatal(err)
		}
		return path
	}
	if b.Requests == "" {
		b.Requests = filepath.Join(r.dir, "requests")
	}
	binary := filepath.Join(r.dir, "firecracker")
	if err := firecrackerfake.Program(binary, b); err != nil {
		r.Fatal(err)
	}
	c := vmm.Config{
		ID: "web_1", Binary: binary, Accelerator: vmm.KVM, VCPUs: 2, MemoryMiB: 16, Channel: true,
		Kernel: file("vmlinux", "\x7fELF"), Initrd: file("initramfs", ""), BootArgs: "quiet",
		Drives:      []vmm.Drive{{Path: file("a,b =c", "a"), Format: "raw"}, {Path: file("other", "b"), Format: "raw", ReadOnly: true}},
		ConsolePath: filepath.Join(r.dir, "console"), LogPath: filepath.Join(r.dir, "vmm.log"), WorkDir: r.dir,
	}
	if edit != nil {
		edit(&c)
	}
	return c
}

// start starts a VM.
func (r *room) start(c vmm.Config) vmm.Instance {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	instance, err := firecracker.New(firecracker.Options{Launcher: namespacetest.Program()}).Start(ctx, c)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() {
		if err := instance.Kill(context.Background()); err != nil {
			r.Error(err)
		}
		r.clean()
	})
	return instance
}

// clean checks that a VMM has left no directory.
func (r *room) clean() {
	r.Helper()
	if _, err := os.Lstat(filepath.Join(r.dir, "vmm")); !errors.Is(err, os.ErrNotExist) {
		r.Errorf("the VMM's directory is left: %v", err)
	}
}

// talk opens the channel of a VM.
func (r *room) open(instance vmm.Instance) (vmm.Channel, *bufio.Scanner) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	channel, err := instance.OpenChannel(ctx)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { _ = channel.Close() })
	return channel, bufio.NewScanner(channel)
}

func (r *room) end(instance vmm.Instance) vmm.Exit {
	r.Helper()
	select {
	case <-instance.Done():
	case <-time.After(patience):
		r.Fatal("the VM does not end")
	}
	return instance.Exit()
}

// requests returns what the fake was told: what begins so, without that.
func (r *room) requests(prefix string) []string {
	r.Helper()
	text, err := os.ReadFile(filepath.Join(r.dir, "requests"))
	if err != nil {
		r.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), prefix); ok {
			found = append(found, rest)
		}
	}
	return found
}

// A guest ends in each way that there is, and is said to have.
func TestEnds(t *testing.T) {
	t.Parallel()
	for order, want := range map[string]struct {
		reason vmm.ExitReason
		detail string
	}{
		"halt":   {vmm.ExitPowerOff, ""},
		"reboot": {vmm.ExitReboot, ""},
		"panic":  {vmm.ExitPanic, "told so"},

		"triple fault":                   {vmm.ExitReboot, "triple fault"},
		"triple fault of later releases": {vmm.ExitReboot, "triple fault"},

		"crash": {vmm.ExitCrashed, "its seccomp filter forbids): fake Firecracker smolvm-web-1; out of paper"},
	} {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			r := newRoom(t)
			instance := r.start(r.config(firecrackerfake.Behaviour{Deaf: 3}, nil))
			channel, lines := r.open(instance)
			if _, err := fmt.Fprintln(channel, "print a word\nprint "+order); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if !lines.Scan() {
					t.Fatal("the channel has ended: ", lines.Err())
				}
			}
			if _, err := fmt.Fprintln(channel, order); err != nil {
				t.Fatal(err)
			}
			if got := r.end(instance); got.Reason != want.reason || !strings.Contains(got.Detail, want.detail) {
				t.Errorf("Exit = %+v", got)
			}
			keeper := instance.(vmm.Consoler) //nolint:forcetypeassert // it is one
			if !strings.Contains(keeper.ConsoleTail(1<<10), "a word\n"+order) {
				t.Errorf("the console is %q", keeper.ConsoleTail(1<<10))
			}
		})
	}
}

// Whatever goes wrong at a call, the start fails with the call or with Firecracker's words, and
// nothing is left.
func TestStartFaults(t *testing.T) {
	t.Parallel()
	boot := []string{"GET /version", "PUT /machine-config", "PUT /boot-source", "PUT /drives/drive1", "PUT /vsock", "PUT /entropy", "PUT /actions"}
	for _, call := range boot {
		for fault, want := range map[firecrackerfake.Fault]string{
			firecrackerfake.FaultRefuse: "Firecracker refuses " + call + ": " + firecrackerfake.Refusal,
			firecrackerfake.FaultDie:    "Firecracker: exit status 1: fake Firecracker smolvm-web-1; the fake dies",
			firecrackerfake.FaultHang:   call,
			firecrackerfake.FaultCut:    "can't be read",
			firecrackerfake.FaultLong:   "is longer than",
		} {
			if fault == firecrackerfake.FaultCut && call != "GET /version" {
				continue // it is answered by no JSON
			}
			t.Run(call+" "+string(fault), func(t *testing.T) {
				t.Parallel()
				r := newRoom(t)
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				if fault == firecrackerfake.FaultHang {
					// It is given up when it was asked.
					var stop context.CancelFunc
					ctx, stop = context.WithCancel(ctx)
					go func() {
						defer stop()
						r.await(ctx, call)
					}()
				}
				instance, err := firecracker.New(firecracker.Options{}).Start(ctx, r.config(firecrackerfake.Behaviour{Call: call, Fault: fault}, nil))
				if instance != nil || err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `VM "web_1"`) {
					t.Errorf("Start = %v, %v, want %q", instance, err, want)
				}
				if fault == firecrackerfake.FaultHang && !errors.Is(err, context.Canceled) {
					t.Errorf("error is %v, want the cancellation", err)
				}
				r.clean()
			})
		}
	}
}

// await returns when a request was received.
func (r *room) await(ctx context.Context, call string) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		text, _ := os.ReadFile(filepath.Join(r.dir, "requests"))
		if strings.Contains(string(text), call) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// What can't be started is refused with the reason, and what to do about it.
func TestStartRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		behaviour firecrackerfake.Behaviour
		edit      func(r *room, c *vmm.Config)
		want      string
		kind      error // nil: any
	}{
		"too old":    {firecrackerfake.Behaviour{Version: "1.6.0"}, nil, "it is of version 1.6.0, and 1.7.0 or later is needed", nil},
		"no version": {firecrackerfake.Behaviour{Version: "new"}, nil, `"new" is no version`, nil},
		"emulation":  {edit: func(_ *room, c *vmm.Config) { c.Accelerator = vmm.TCG }, want: "runs VMs by KVM", kind: smolvm.ErrUnsupported},
		"33 CPUs":    {edit: func(_ *room, c *vmm.Config) { c.VCPUs = 33 }, want: "at most 32 CPUs", kind: smolvm.ErrUnsupported},
		"qcow2": {
			edit: func(_ *room, c *vmm.Config) { c.Drives[1].Format = "qcow2" }, want: "Firecracker uses raw disks, and not qcow2", kind: smolvm.ErrUnsupported,
		},
		"no TAP":     {edit: func(_ *room, c *vmm.Config) { c.NIC = &vmm.NIC{MAC: "02:00:00:00:00:02", TAP: "none-there"} }, want: "none-there"},
		"no WorkDir": {edit: func(_ *room, c *vmm.Config) { c.WorkDir = "" }, want: "no directory to work in"},
		"a bzImage": {edit: func(r *room, c *vmm.Config) {
			if err := os.WriteFile(c.Kernel, []byte("MZ"), 0o600); err != nil {
				r.Fatal(err)
			}
		}, want: "boots ELF files (vmlinux) only"},
		"another machine's program": {edit: func(r *room, c *vmm.Config) {
			if err := os.WriteFile(c.Binary, []byte("\x7fELF nothing that runs"), 0o700); err != nil {
				r.Fatal(err)
			}
		}, want: "no program for this machine's kind of CPU"},
		"not executable": {edit: func(r *room, c *vmm.Config) {
			if err := os.Chmod(c.Binary, 0o600); err != nil {
				r.Fatal(err)
			}
		}, want: "can't be executed"},
		"not there": {edit: func(_ *room, c *vmm.Config) { c.Binary += ".none" }, want: "not found"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRoom(t)
			c := r.config(test.behaviour, nil)
			if test.edit != nil {
				test.edit(r, &c)
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			instance, err := firecracker.New(firecracker.Options{}).Start(ctx, c)
			if instance != nil || err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Start = %v, %v, want %q", instance, err, test.want)
			}
			if test.kind != nil && !errors.Is(err, test.kind) {
				t.Errorf("error is %v, want %v", err, test.kind)
			}
			r.clean()
		})
	}
}

// A Firecracker that makes no socket is given up with the call.
func TestSilent(t *testing.T) {
	t.Parallel()
	r := newRoom(t)
	ctx, cancel := context.WithCancel(t.Context())
	c := r.config(firecrackerfake.Behaviour{Silent: true}, nil)
	go func() {
		defer cancel()
		for ctx.Err() == nil {
			if text, _ := os.ReadFile(c.LogPath); strings.Contains(string(text), "fake Firecracker") {
				return
			}
		}
	}()
	if _, err := firecracker.New(firecracker.Options{}).Start(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("Start: %v", err)
	}
	r.clean()
}
