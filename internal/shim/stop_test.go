package shim_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/proc"
	"github.com/smolvm/smolvm/internal/shim"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm"
)

func TestTTL(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	f.opts.Spec.TTL = 100 * time.Millisecond
	record := f.end(f.launch())
	if record.Exit.Reason != vmm.ExitPowerOff || !strings.Contains(record.Exit.Detail, "time to live is over") {
		t.Errorf("exit record is %+v", record)
	}
}

// A signal stops the VM in an orderly way.
func TestSignal(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	launched := f.launch()
	if err := syscall.Kill(launched.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if record := f.end(launched); record.Exit.Reason != vmm.ExitPowerOff || !strings.Contains(record.Exit.Detail, "told to end") {
		t.Errorf("exit record is %+v", record)
	}
}

// A VMM that ends by itself is noticed.
func TestVMMKilled(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	launched := f.launch()
	if err := proc.Kill(t.Context(), launched.VMMPID, launched.VMMStart); err != nil {
		t.Fatal(err)
	}
	if record := f.end(launched); record.Exit.Reason != vmm.ExitCrashed || !record.Committed {
		t.Errorf("exit record is %+v", record)
	}
}

// A shim that is killed takes the VMM along, and clients are told. What it leaves
// does not keep the next one from starting.
func TestShimKilled(t *testing.T) {
	t.Parallel()
	f := newFixture(t, hasAgent)
	launched := f.launch()
	waiting, err := f.client().DialAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	echo(t, waiting)
	if err := proc.Kill(t.Context(), launched.PID, launched.Start); err != nil {
		t.Fatal(err)
	}
	if err := proc.Wait(t.Context(), launched.VMMPID, launched.VMMStart); err != nil {
		t.Fatal(err)
	}
	if _, err := waiting.Read(make([]byte, 1)); err == nil {
		t.Error("a connection to the agent outlives the shim")
	}
	_, statusErr := f.client().Status(t.Context())
	_, dialErr := f.client().DialAgent(t.Context())
	for _, err := range []error{statusErr, dialErr, f.client().Stop(t.Context(), shim.Stop{})} {
		if !errors.Is(err, shim.ErrGone) {
			t.Errorf("error is %v, want %v", err, shim.ErrGone)
		}
	}
	if err := os.WriteFile(filepath.Join(f.opts.Spec.RuntimeDir, "other"), nil, 0o600); err != nil {
		t.Errorf("the shim was killed, and its directory is gone: %v", err)
	}
	second := f.launch()
	f.stop(patience)
	f.end(second)
}

// Each way to stop a VM, and what is said when it fails.
func TestStop(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		args   []string
		grace  time.Duration
		reason vmm.ExitReason
		texts  []string // in the record
	}{
		"by agent":              {[]string{hasAgent}, patience, vmm.ExitPowerOff, []string{"stopped by request"}},
		"by button":             {[]string{deafAgent, hasButton}, 8 * time.Second, vmm.ExitPowerOff, []string{"stopped by request"}},
		"by force":              {[]string{deafAgent}, 4 * time.Second, vmm.ExitKilled, []string{"did not shut down in 4s", "the agent did not finish", "power button"}},
		"by force at once":      {[]string{hasAgent}, 0, vmm.ExitKilled, []string{"stopped by request"}},
		"by force, no patience": {[]string{hasAgent}, time.Nanosecond, vmm.ExitKilled, []string{"did not shut down in 1ns"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, test.args...)
			launched := f.launch()
			f.stop(test.grace)
			record := f.end(launched)
			if record.Exit.Reason != test.reason {
				t.Errorf("exit record is %+v, want %s", record, test.reason)
			}
			for _, text := range test.texts {
				if !strings.Contains(record.Exit.Detail, text) {
					t.Errorf("exit is %q, want %q in it", record.Exit.Detail, text)
				}
			}
		})
	}
}

// Of several stops at once the most impatient wins, and all of them succeed.
func TestConcurrentStops(t *testing.T) {
	t.Parallel()
	f := newFixture(t, deafAgent)
	launched := f.launch()
	var stops sync.WaitGroup
	for range 4 {
		stops.Go(func() {
			// On a busy host it may come when the VM has been stopped by the last one.
			if err := f.client().Stop(t.Context(), shim.Stop{Grace: time.Hour, Patient: true}); err != nil && !errors.Is(err, shim.ErrGone) {
				t.Error(err)
			}
		})
	}
	stops.Go(func() { f.stop(0) })
	stops.Wait()
	f.end(launched)
	if err := f.client().Stop(t.Context(), shim.Stop{}); !errors.Is(err, shim.ErrGone) {
		t.Errorf("stop of what has stopped: %v, want %v", err, shim.ErrGone)
	}
}

// Whatever guest and VMM do, a VM ends in the time of whatever ends it.
func TestStopHasAClock(t *testing.T) {
	t.Parallel()
	const slack = 6 * time.Second // one is promised, the others are for a busy host
	for name, test := range map[string]struct {
		args  []string
		hold  bool // the VMM is stopped by a signal
		limit time.Duration
		end   func(f *fixture, l *shim.Launched)
	}{
		"stop of a VMM that hangs": {[]string{hasAgent, stuck}, false, 500 * time.Millisecond, func(f *fixture, _ *shim.Launched) {
			f.stop(500 * time.Millisecond)
		}},
		"stop of a VMM that is held by a signal": {[]string{hasAgent}, true, 500 * time.Millisecond, func(f *fixture, _ *shim.Launched) {
			f.stop(500 * time.Millisecond)
		}},
		"stop of a guest that floods its channel": {[]string{floods}, false, 500 * time.Millisecond, func(f *fixture, _ *shim.Launched) {
			f.stop(500 * time.Millisecond)
		}},
		"end of the time to live of a VMM that hangs": {[]string{hasAgent, stuck}, false, 10 * time.Second, func(*fixture, *shim.Launched) {}},
		"second signal, with a shim that stops a VMM that hangs": {[]string{hasAgent, stuck}, false, 500 * time.Millisecond, func(f *fixture, l *shim.Launched) {
			_ = syscall.Kill(l.PID, syscall.SIGTERM)
			f.stop(500 * time.Millisecond)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, test.args...)
			if strings.Contains(name, "time to live") {
				f.opts.Spec.TTL = time.Millisecond
			}
			launched := f.launch()
			if test.hold {
				testenv.Suspend(t, launched.VMMPID)
			}
			began := time.Now()
			test.end(f, launched)
			record := f.end(launched)
			if took := time.Since(began); took > test.limit+slack {
				t.Errorf("it took %s, of %s", took, test.limit)
			}
			if record.Exit.Reason != vmm.ExitKilled || !strings.Contains(record.Exit.Detail, "did not shut down in") {
				t.Errorf("exit record is %+v", record)
			}
		})
	}
}

// A guest that listens to nothing is not waited for, unless that is what was asked for.
func TestStopOfDeafGuest(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		args     []string
		how      shim.Stop
		min, max time.Duration
	}{
		"deaf":              {nil, shim.Stop{Grace: patience}, 0, 10 * time.Second},
		"deaf, but patient": {nil, shim.Stop{Grace: 3 * time.Second, Patient: true}, 3 * time.Second, 9 * time.Second},
		"at work":           {[]string{busy}, shim.Stop{Grace: 3 * time.Second}, 3 * time.Second, 9 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, test.args...)
			f.opts.Spec.Ready, f.opts.Spec.Hello = smolvm.ReadyStarted, nil
			launched := f.launch()
			f.awaitConsole()
			began := time.Now()
			if err := f.client().Stop(t.Context(), test.how); err != nil {
				t.Error(err)
			}
			f.end(launched)
			if took := time.Since(began); took < test.min || took > test.max {
				t.Errorf("it took %s, want %s to %s", took, test.min, test.max)
			}
		})
	}
}
