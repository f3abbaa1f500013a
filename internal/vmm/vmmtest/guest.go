package vmmtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/vmm"
)

// patience is how long a test waits for what must come in the end. An emulated
// guest on a busy host is slow, and one whose KVM is emulated too is slower, so it is long; only
// a defect makes a test use it up.
const patience = 6 * time.Minute

// obey is the guest's init: it runs each line that comes in by the channel, and
// answers with its output and a line with the exit status. It goes on when the
// host's end closes, so that a VM never ends but by what is tested.
const obey = `
# The keys by which a machine is shut down are not to restart it, but to be told to init, which
# does not listen.
trap '' INT
echo 0 >/proc/sys/kernel/ctrl-alt-del
case " $(cat /proc/cmdline) " in *" ` + vsockWord + ` "*)
	mkfifo ` + pipeIn + ` ` + pipeOut + `
	/` + RelayProgram + ` ` + RelayCommand + ` >/dev/console 2>&1 &
	exec 3<` + pipeIn + ` 4>` + pipeOut + `
	while read -r line <&3; do
		eval "$line" </dev/null >&4 2>&1
		echo "` + status + `$?" >&4
	done
esac
while [ -z "$port" ]; do
	for p in /sys/class/virtio-ports/*; do
		[ "$(cat "$p/name" 2>/dev/null)" = ` + vmm.ChannelPort + ` ] && port=/dev/${p##*/}
	done
	sleep 0.02
done
# It can't be opened before the guest's driver knows that the host is there; and
# it is opened once only, as closing it discards what the host has written.
while true; do
	{
		echo ` + ready + ` >&3
		while read -r line <&3; do
			eval "$line" </dev/null >&3 2>&1
			echo "` + status + `$?" >&3
		done
	} 3<>"$port" 2>/dev/null
	sleep 0.02
done
`

const (
	ready  = "vmmtest-ready"
	status = "vmmtest-status "
)

// vsockWord is the kernel's argument that a backend adds whose channel is vsock.
const vsockWord = vmm.ChannelVsockArg + "=1024"

// kit is what one case needs to start VMs.
type kit struct {
	*testing.T
	backend vmm.Backend
	assets  Assets
	initrd  string
	// root is the test's directory, and dir one below it with an awkward name.
	root, dir string
	count     int
}

func newKit(t *testing.T, backend vmm.Backend, assets Assets, initrd string) *kit {
	k := &kit{T: t, backend: backend, assets: assets, initrd: initrd, root: t.TempDir()}
	k.dir = filepath.Join(k.root, "a,b =c")
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.checkProcesses)
	return k
}

// checkProcesses reports processes with the test's directory in their command line.
func (k *kit) checkProcesses() {
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		k.Fatal(err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		if bytes.Contains(text, []byte(k.root)) {
			k.Errorf("process is left: %s: %s", path, bytes.ReplaceAll(text, []byte{0}, []byte(" ")))
		}
	}
}

// config returns the configuration of another VM.
func (k *kit) config(edit func(*vmm.Config)) vmm.Config {
	k.count++
	id := fmt.Sprintf("vmmtest-%d", k.count)
	workDir := filepath.Join(k.dir, id+".work")
	if err := os.Mkdir(workDir, 0o700); err != nil {
		k.Fatal(err)
	}
	cfg := vmm.Config{
		ID:          id,
		Accelerator: k.assets.Accelerator,
		VCPUs:       1,
		MemoryMiB:   128,
		Kernel:      k.assets.Kernel,
		Initrd:      k.initrd,
		// Not quiet: a test that fails shows how far the guest has come.
		BootArgs:    "console=ttyS0 reboot=k panic=1 " + k.assets.BootArgs,
		Channel:     true,
		ConsolePath: filepath.Join(k.dir, id+".console"),
		LogPath:     filepath.Join(k.dir, id+".log"),
		WorkDir:     workDir,
	}
	if edit != nil {
		edit(&cfg)
	}
	return cfg
}

// guest is a running VM.
type guest struct {
	*kit
	vmm.Instance
	cfg     vmm.Config
	channel vmm.Channel // nil: it was not opened
	// lines are what the guest says over the channel; closed at its end.
	lines <-chan string
	// mayReset is set when the guest is to be saved, by which its channel may be reset.
	mayReset bool
}

// start starts a VM, opens its channel, and returns when its CPUs run.
func (k *kit) start(edit func(*vmm.Config)) *guest {
	k.Helper()
	g := k.launch(edit)
	if g.cfg.Channel {
		g.open()
	}
	return g
}

// launch starts a VM and returns when its CPUs run.
func (k *kit) launch(edit func(*vmm.Config)) *guest {
	k.Helper()
	cfg := k.config(edit)
	ctx, cancel := context.WithTimeout(k.Context(), patience)
	defer cancel()
	instance, err := k.backend.Start(ctx, cfg)
	if err != nil {
		k.Fatal(err)
	}
	g := &guest{kit: k, Instance: instance, cfg: cfg}
	k.Cleanup(g.cleanup)
	return g
}

// open opens the guest's channel.
func (g *guest) open() {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.Context(), patience)
	defer cancel()
	channel, err := g.OpenChannel(ctx)
	if err != nil {
		g.Fatal(err)
	}
	g.channel, g.lines = channel, readLines(channel)
}

// wasReset reports whether the VMM has ended the channel.
func (g *guest) wasReset() bool {
	_, err := g.channel.Write(nil)
	return err != nil
}

// reopen opens a channel that was reset, or closed by the test.
func (g *guest) reopen() {
	g.Helper()
	_ = g.channel.Close()
	for range g.lines { // its reader ends
	}
	g.open()
	if got := g.line(); got != ready {
		g.Fatalf("by a new channel the guest says %q, want %q", got, ready)
	}
}

// boot starts a VM and returns when the guest listens.
func (k *kit) boot(edit func(*vmm.Config)) *guest {
	k.Helper()
	g := k.start(edit)
	if got := g.line(); got != ready {
		k.Fatalf("the guest says %q, want %q", got, ready)
	}
	return g
}

// cleanup kills the VM, and shows what it said if the test failed.
func (g *guest) cleanup() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := g.Kill(ctx); err != nil {
		g.Errorf("kill: %v", err)
	}
	if g.channel != nil {
		_ = g.channel.Close()
		for range g.lines { // its reader has ended then
		}
	}
	if g.Failed() {
		g.Logf("console:\n%s\nlog:\n%s", readFile(g.cfg.ConsolePath), readFile(g.cfg.LogPath))
	}
}

// readLines hands out lines until the channel ends.
func readLines(channel io.Reader) <-chan string {
	lines := make(chan string, 100)
	go func() {
		defer close(lines)
		scanner := bufio.NewScanner(channel)
		scanner.Buffer(nil, 4<<20)
		for scanner.Scan() {
			lines <- strings.TrimSuffix(scanner.Text(), "\r")
		}
	}()
	return lines
}

// line returns the guest's next line.
func (g *guest) line() string {
	g.Helper()
	select {
	case line, open := <-g.lines:
		if !open {
			g.Fatalf("the channel has ended: %v", g.end())
		}
		return line
	case <-time.After(patience):
		g.Fatal("the guest says nothing")
	}
	return ""
}

// tell makes the guest run a command, and does not wait for it.
func (g *guest) tell(command string) {
	g.Helper()
	if g.mayReset && g.wasReset() {
		g.reopen()
	}
	if _, err := g.channel.Write([]byte(command + "\n")); err != nil {
		g.Fatalf("tell the guest to %s: %v", command, err)
	}
}

// try makes the guest run a command, and returns its output and exit status.
func (g *guest) try(command string) (output, code string) {
	g.Helper()
	g.tell(command)
	var lines []string
	for {
		line := g.line()
		if line == ready { // of a restored guest, if its channel is a new one for it too
			continue
		}
		if code, found := strings.CutPrefix(line, status); found {
			return strings.Join(lines, "\n"), code
		}
		lines = append(lines, line)
	}
}

// run makes the guest run a command that must succeed, and returns its output.
func (g *guest) run(command string) string {
	g.Helper()
	output, code := g.try(command)
	if code != "0" {
		g.Fatalf("in the guest, %s: exit status %s: %s", command, code, output)
	}
	return output
}

// end waits for the VM's end.
func (g *guest) end() vmm.Exit {
	g.Helper()
	select {
	case <-g.Done():
	case <-time.After(patience):
		g.Fatal("the VM does not end")
	}
	return g.Exit()
}

// killed kills the VM.
func (g *guest) killed() vmm.Exit {
	g.Helper()
	g.kill(g.Context())
	return g.end()
}

// kill checks that Kill succeeds, and not before the VM has ended.
func (g *guest) kill(ctx context.Context) {
	g.Helper()
	if err := g.Kill(ctx); err != nil {
		g.Errorf("kill: %v", err)
	}
	select {
	case <-g.Done():
	default:
		g.Error("Kill returns before the VM has ended")
	}
}

func readFile(path string) string {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return string(text)
}
