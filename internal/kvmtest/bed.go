package kvmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
)

const (
	// atOnce is how many outer machines run at once at most, each on a CPU of the host.
	atOnce = 2
	// prepareTimeout bounds all that is made before an outer machine starts, which may
	// download packages and build all tests.
	prepareTimeout = 15 * time.Minute
	// grace is how long after its timeout a test binary may take to tell where it hangs.
	grace = 30 * time.Second
	// attempts is how many outer machines a job may break.
	attempts = 3
)

// Bed makes outer machines that have the tests of jobs.
type Bed struct {
	vms    *manager.Manager
	module string
	// home is the directory of the machines, and drive the file system of all tests.
	home, drive string
	slots       chan struct{} // what runs has one
	machines    atomic.Int64  // how many there were
}

// Open builds the tests of the jobs, and what outer machines are made of. It ends with
// the test. The calling program's main, or TestMain, must begin with shim.Main.
func Open(t *testing.T, jobs []Job) *Bed {
	t.Helper()
	testenv.RequireQEMU(t)
	ctx, cancel := context.WithTimeout(t.Context(), prepareTimeout)
	defer cancel()
	module := testenv.Module(t)
	b := &Bed{module: module, drive: filepath.Join(t.TempDir(), "drive"), slots: make(chan struct{}, min(atOnce, runtime.NumCPU()))}
	begun := time.Now()
	done := func(what string) {
		t.Logf("%s: %.1f s", what, time.Since(begun).Seconds())
		begun = time.Now()
	}
	dir := filepath.Join(testenv.Cache(t), "kvm")
	b.prepare(ctx, t, dir, jobs, done)
	b.open(ctx, t, dir)
	return b
}

// prepare makes the image of the outer machine in dir, and its drive.
func (b *Bed) prepare(ctx context.Context, t *testing.T, dir string, jobs []Job, done func(string)) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := flock.Lock(ctx, lock); err != nil {
		t.Fatal(err)
	}
	base, agent := testenv.Image(t), testenv.Agent(t)
	done("default image")
	last := ""
	progress := func(phase string) {
		if phase != last {
			t.Log(phase)
		}
		last = phase
	}
	if _, err := ensureImage(ctx, dir, filepath.Join(b.module, toolsDir), agent, progress); err != nil {
		t.Fatal(err)
	}
	done("image of the outer machine")
	stage, err := os.MkdirTemp(dir, "drive-*")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(stage) }()
	d := drive{module: b.module, stage: stage}
	if err := d.addAll(ctx, jobs, agent, base); err != nil {
		t.Fatal(err)
	}
	done("build the tests")
	if err := d.make(ctx, b.drive); err != nil {
		t.Fatal(err)
	}
	done("make a drive of them")
}

// open opens the manager of the outer machines, whose image is in dir.
func (b *Bed) open(ctx context.Context, t *testing.T, dir string) {
	t.Helper()
	// Sockets are made below it, so it has a short name.
	var err error
	if b.home, err = os.MkdirTemp("", "smolvm-kvm-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(b.home); err != nil {
			t.Errorf("remove the directory of the outer machine: %v", err)
		}
	})
	config := manager.Config{
		DataDir: filepath.Join(b.home, "data"), SocketDir: filepath.Join(b.home, "run"),
		Backend: "qemu", Embedded: true, AgentPath: testenv.Agent(t),
		Templates: manager.TemplateConfig{Disabled: true},
	}
	if err := os.MkdirAll(config.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "images"), filepath.Join(config.DataDir, "images")); err != nil {
		t.Fatal(err)
	}
	if b.vms, err = manager.Open(ctx, config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.vms.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}

// Run runs a job in an outer machine of its own, and reports its tests as subtests of t. It may be
// called several times at once, and waits while as many run as the host has CPUs for. When a
// machine breaks while tests fail, the job is run again in another: that says nothing of the
// tests. What fails in a machine that is well is never run again.
func (b *Bed) Run(t *testing.T, job Job) {
	t.Helper()
	b.slots <- struct{}{}
	defer func() { <-b.slots }()
	said, failed, broken := unbroken(t, func(out io.Writer) (failed, broken error) { return b.try(t, job, out) })
	runJob(t, job, func(_ context.Context, out io.Writer) error {
		_, err := out.Write(said)
		return errors.Join(failed, err)
	})
	if broken != nil {
		t.Errorf("no outer machine lasted: %v", broken)
	}
}

// logger is what is told of machines that break.
type logger interface {
	Context() context.Context
	Logf(format string, args ...any)
}

// unbroken tries until a machine lasts, [attempts] times at most. It returns the output of the last
// one, and what that returned.
func unbroken(t logger, try func(out io.Writer) (failed, broken error)) (said []byte, failed, broken error) {
	for attempt := 1; ; attempt++ {
		var out bytes.Buffer
		failed, broken = try(&out)
		if broken == nil || attempt == attempts || t.Context().Err() != nil {
			return out.Bytes(), failed, broken
		}
		t.Logf("THE OUTER MACHINE BROKE, attempt %d of %d; the job runs again in another: %v", attempt, attempts, broken)
	}
}

// try runs a job in a new outer machine, and returns how it ended. Broken is set, too, if it
// failed and the machine is the reason.
func (b *Bed) try(t logger, job Job, out io.Writer) (failed, broken error) {
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout+job.timeout()+grace)
	defer cancel()
	m := machine{Bed: b, id: fmt.Sprintf("bed-%d", b.machines.Add(1))}
	begun := time.Now()
	if broken = m.boot(ctx); broken == nil {
		booted := time.Now()
		failed, broken = m.exec(ctx, job, out)
		t.Logf("boot the outer machine: %.1f s, run in it: %.1f s, CPU time of both: %s",
			booted.Sub(begun).Seconds(), time.Since(booted).Seconds(), m.cpuTime(ctx))
	}
	if broken != nil {
		failed = broken
	}
	if failed != nil {
		said, err := m.console(ctx)
		failed = errors.Join(failed, err)
		switch sign := signOfBreakage(said); {
		case broken != nil:
			broken = fmt.Errorf("%w\nits console ends with:\n%s", broken, said)
		case sign != "":
			broken = fmt.Errorf("its kernel says %q; its console ends with:\n%s", sign, said)
		}
	}
	return errors.Join(failed, m.end(ctx)), broken
}

// runJob reports the tests of a job, which start runs, as subtests of t. The test binary
// writes what test2json understands.
func runJob(t *testing.T, job Job, start func(ctx context.Context, out io.Writer) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), job.timeout()+grace)
	defer cancel()
	read, write := io.Pipe()
	convert := exec.CommandContext(t.Context(), "go", "tool", "test2json")
	convert.Stdin = read
	var complaint bytes.Buffer
	convert.Stderr = &complaint
	events, err := convert.StdoutPipe()
	if err == nil {
		err = convert.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		err := start(ctx, write)
		_ = write.Close()
		ended <- err
	}()
	tests, err := report(t, events, job.maySkip)
	_ = read.CloseWithError(io.ErrClosedPipe)
	err = errors.Join(err, convert.Wait())
	if runErr := <-ended; runErr != nil && !t.Failed() || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Errorf("the tests of %s: %v", job.Package, runErr)
	} else if runErr != nil {
		t.Log(runErr)
	}
	switch {
	case err != nil:
		t.Errorf("read what the tests say: %v: %s", err, complaint.String())
	case tests == 0 && !t.Failed():
		t.Errorf("package %s has no test that fits %q", job.Package, job.Flags)
	}
}
