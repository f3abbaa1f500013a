package shim_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
)

// patience is how long a test waits for what must come.
const patience = 60 * time.Second

// fixture is the surroundings of one VM.
type fixture struct {
	testing.TB
	dir  string
	opts shim.LaunchOptions
}

// newFixture prepares the launch of a fake VM with an agent, and checks at the end of
// the test that nothing is left of it.
func newFixture(t testing.TB, bootArgs ...string) *fixture {
	t.Helper()
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{TB: t, dir: dir}
	f.opts = shim.LaunchOptions{
		Program: []string{self, shimRole},
		LogPath: filepath.Join(dir, "shim.log"),
		Spec: shim.Spec{
			ID: "shim-test-" + rand.Text(), Run: "run-1", Backend: "fake",
			VMM: vmm.Config{
				BootArgs:    strings.Join(bootArgs, " "),
				ConsolePath: filepath.Join(dir, "console.log"),
				LogPath:     filepath.Join(dir, "vmm.log"),
			},
			Hello:        &wire.Hello{Hostname: "host"},
			Ready:        smolvm.ReadyAgent,
			ReadyTimeout: patience,
			RuntimeDir:   filepath.Join(dir, "run", "vm"),
			Origin:       shim.Origin{DataDir: dir},
		},
	}
	t.Cleanup(f.cleanup)
	return f
}

// cleanup checks that nothing is left. A shim that is about to go may take its time.
func (f *fixture) cleanup() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, process := range testenv.Processes(f.opts.Spec.ID) {
		var pid int
		if _, err := fmt.Sscanf(process, "%d:", &pid); err != nil {
			f.Fatal(err)
		}
		if start, err := proc.StartTime(pid); err == nil && proc.Wait(ctx, pid, start) != nil {
			f.Errorf("left behind: process %s", process)
			_ = proc.Kill(context.Background(), pid, start)
		}
	}
	if _, err := os.Stat(f.opts.Spec.RuntimeDir); err == nil {
		f.Errorf("left behind: %s", f.opts.Spec.RuntimeDir)
	}
	if f.Failed() {
		log, _ := os.ReadFile(f.opts.LogPath)
		f.Logf("shim's log:\n%s", log)
	}
}

func (f *fixture) client() *shim.Client { return shim.NewClient(f.opts.Spec.RuntimeDir) }

// launch launches the VM and commits.
func (f *fixture) launch() *shim.Launched {
	f.Helper()
	launched, err := shim.Launch(f.Context(), f.opts)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { launched.Abort(context.Background()) })
	if err := launched.Commit(); err != nil {
		f.Fatal(err)
	}
	return launched
}

// end waits for the end of the shim, and returns what it has recorded.
func (f *fixture) end(launched *shim.Launched) shim.ExitRecord {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), patience)
	defer cancel()
	if err := proc.Wait(ctx, launched.PID, launched.Start); err != nil {
		f.Fatal(err)
	}
	if proc.Alive(launched.VMMPID, launched.VMMStart) {
		f.Error("the VMM has outlived its shim")
	}
	return f.record()
}

func (f *fixture) record() shim.ExitRecord {
	f.Helper()
	var record shim.ExitRecord
	text, err := os.ReadFile(filepath.Join(f.opts.Spec.Origin.DataDir, recordName))
	if err == nil {
		err = json.Unmarshal(text, &record)
	}
	if err != nil {
		f.Fatal("exit record: ", err)
	}
	if record.ID != f.opts.Spec.ID || record.Run != "run-1" {
		f.Errorf("exit record is of run %q of VM %q", record.Run, record.ID)
	}
	return record
}

func (f *fixture) stop(grace time.Duration) {
	f.Helper()
	if err := f.client().Stop(f.Context(), shim.Stop{Grace: grace, Patient: true}); err != nil {
		f.Errorf("stop: %v", err)
	}
}

func TestReadyByAgent(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	launched := f.launch()
	if launched.Answer.Version != "fake" || launched.Answer.Kernel != "host" {
		t.Errorf("answer is %+v", launched.Answer)
	}
	var steps []string
	for _, step := range launched.Timeline {
		steps = append(steps, step.Name)
	}
	if got, want := strings.Join(steps, ", "), "VMM, agent, ready"; got != want {
		t.Errorf("timeline is %s, want %s", got, want)
	}
	if !proc.Alive(launched.PID, launched.Start) || !proc.Alive(launched.VMMPID, launched.VMMStart) {
		t.Errorf("processes are not alive: %+v", launched)
	}

	status, err := f.client().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if status.ID != f.opts.Spec.ID || status.Run != "run-1" || status.PID != launched.PID ||
		status.VMMPID != launched.VMMPID || status.Uptime <= 0 || status.Answer == nil || len(status.Forwards) != 0 {
		t.Errorf("status is %+v", status)
	}
	for path, want := range map[string]fs.FileMode{
		f.opts.Spec.RuntimeDir:                     fs.ModeDir | 0o700,
		shim.ControlSocket(f.opts.Spec.RuntimeDir): fs.ModeSocket | 0o600,
		shim.AgentSocket(f.opts.Spec.RuntimeDir):   fs.ModeSocket | 0o600,
	} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, mode is not %s", info, err, want)
		}
	}
	conn, err := f.client().DialAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	echo(t, conn)
	f.stop(patience)
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a connection to the agent outlives the VM")
	}
	if record := f.end(launched); record.Exit.Reason != vmm.ExitPowerOff || !record.Committed {
		t.Errorf("exit record is %+v", record)
	}
}

func echo(t testing.TB, conn net.Conn) {
	t.Helper()
	t.Cleanup(func() { _ = conn.Close() })
	const text = "SSH-2.0-hello"
	answer := make([]byte, len(text))
	_, err := io.WriteString(conn, text)
	if err == nil {
		_, err = io.ReadFull(conn, answer)
	}
	if err != nil || string(answer) != text {
		t.Fatalf("echo: %q, %v", answer, err)
	}
}

// A VM without an agent and without a network.
func TestReadyWhenStarted(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasButton)
	f.opts.Spec.Ready, f.opts.Spec.Hello = smolvm.ReadyStarted, nil
	launched := f.launch()
	ctx := t.Context()

	conn, err := f.client().DialAgent(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(conn); err != nil || !strings.Contains(string(text), "no agent") {
		t.Errorf("the agent's socket says %q, %v", text, err)
	}
	_ = conn.Close()
	_, dialErr := f.client().DialGuest(ctx, 22)
	_, forwardErr := f.client().AddForward(ctx, shim.Forward{Host: netip.MustParseAddrPort("127.0.0.1:0"), GuestPort: 80})
	for name, err := range map[string]error{
		"DialGuest": dialErr, "AddForward": forwardErr, "Pause": f.client().Pause(ctx), "Resume": f.client().Resume(ctx),
	} {
		if !errors.Is(err, smolvm.ErrUnsupported) {
			t.Errorf("%s: %v, want %v", name, err, smolvm.ErrUnsupported)
		}
	}
	f.awaitConsole() // before that, its button does not work
	f.stop(patience)
	if record := f.end(launched); record.Exit.Reason != vmm.ExitPowerOff {
		t.Errorf("exit record is %+v", record)
	}
}
