package store

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm"
)

var startedAt = time.Date(2030, 2, 3, 4, 5, 6, 7, time.UTC)

func start(t *testing.T, s *Store, id, run string) {
	t.Helper()
	err := s.MarkStarted(t.Context(), id, Started{
		Run: run, PID: 101, PIDStart: 1 << 40, ShimPID: 100, ShimStart: 999,
		BootID: "boot", Accelerator: "tcg", At: startedAt,
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	want := mustCreate(t, s, newVM("web"))
	check := func(step string) {
		t.Helper()
		if diff := cmp.Diff(want, mustGet(t, s, "web"), equalAddrs); diff != "" {
			t.Fatalf("after %s (-want +got):\n%s", step, diff)
		}
	}
	end := func(run string, state smolvm.VMState, wantChange bool) {
		t.Helper()
		changed, err := s.MarkEnded(t.Context(), "web", run, state, "because of "+run, startedAt.Add(time.Hour))
		if err != nil || changed != wantChange {
			t.Fatalf("MarkEnded = %v, %v; want %v", changed, err, wantChange)
		}
	}

	start(t, s, "web", "run-1")
	want.State, want.Run, want.StartedAt = smolvm.StateRunning, "run-1", startedAt
	want.PID, want.PIDStart, want.ShimPID, want.ShimStart = 101, 1<<40, 100, 999
	want.BootID, want.Accelerator = "boot", "tcg"
	check("start")

	end("run-1", smolvm.StateStopped, true)
	want.State, want.Cause, want.StoppedAt = smolvm.StateStopped, "because of run-1", startedAt.Add(time.Hour)
	check("end")
	end("run-1", smolvm.StateError, false)
	check("second report of the same end")

	start(t, s, "web", "run-2")
	want.State, want.Run, want.Cause, want.StoppedAt = smolvm.StateRunning, "run-2", "", time.Time{}
	check("second start")
	end("run-1", smolvm.StateError, false)
	check("late report of the first run")

	if err := s.SetState(t.Context(), "web", []smolvm.VMState{smolvm.StateRunning}, smolvm.StatePaused); err != nil {
		t.Fatal(err)
	}
	end("run-2", smolvm.StateError, true)
	want.State, want.Cause, want.StoppedAt = smolvm.StateError, "because of run-2", startedAt.Add(time.Hour)
	check("end while paused")
}

func TestMarkFailed(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	want := mustCreate(t, s, newVM("web"))
	if err := s.MarkFailed(t.Context(), "web", "no kernel", startedAt); err != nil {
		t.Fatal(err)
	}
	want.State, want.Cause, want.StoppedAt = smolvm.StateError, "no kernel", startedAt
	if diff := cmp.Diff(want, mustGet(t, s, "web"), equalAddrs); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// What has failed while it ran is told once, unless it was started again meanwhile.
func TestTakeFailed(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	for _, id := range []string{"b", "a", "stopped", "again"} {
		mustCreate(t, s, newVM(id))
		if err := s.MarkStarted(t.Context(), id, Started{Run: id, At: startedAt}); err != nil {
			t.Fatal(err)
		}
		state := smolvm.StateError
		if id == "stopped" {
			state = smolvm.StateStopped
		}
		if _, err := s.MarkEnded(t.Context(), id, id, state, "why", startedAt); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.MarkStarted(t.Context(), "again", Started{Run: "2", At: startedAt}); err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{{"b", "a"}, nil} {
		if got, err := s.TakeFailed(t.Context()); err != nil || !slices.Equal(got, want) {
			t.Errorf("failed are %q, %v; want %q", got, err, want)
		}
	}
}

// A VM that was paused by its VMM goes on without a cause.
func TestMarkPausedByVMM(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	mustCreate(t, s, newVM("web"))
	if err := s.MarkStarted(t.Context(), "web", Started{Run: "1", At: startedAt}); err != nil {
		t.Fatal(err)
	}
	if changed, err := s.MarkCause(t.Context(), "web", "0", smolvm.StatePaused, "of another run"); err != nil || changed {
		t.Errorf("of another run: %t, %v", changed, err)
	}
	if changed, err := s.MarkCause(t.Context(), "web", "1", smolvm.StatePaused, "full"); err != nil || !changed {
		t.Errorf("of this run: %t, %v", changed, err)
	}
	if vm := mustGet(t, s, "web"); vm.State != smolvm.StatePaused || vm.Cause != "full" {
		t.Errorf("it is %s (%s)", vm.State, vm.Cause)
	}
	if err := s.SetState(t.Context(), "web", []smolvm.VMState{smolvm.StatePaused}, smolvm.StateRunning); err != nil {
		t.Fatal(err)
	}
	if vm := mustGet(t, s, "web"); vm.State != smolvm.StateRunning || vm.Cause != "" {
		t.Errorf("then it is %s (%s)", vm.State, vm.Cause)
	}
}

// A VM that runs has a cause while its agent can't be reached, in that run only.
func TestMarkUnreachable(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	mustCreate(t, s, newVM("web"))
	if err := s.MarkStarted(t.Context(), "web", Started{Run: "1", At: startedAt}); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		run, cause string
		changed    bool
		want       string
	}{
		{"0", "of another run", false, ""}, {"1", "deaf", true, "deaf"}, {"1", "deaf", false, "deaf"},
		{"0", "", false, "deaf"}, {"1", "", true, ""}, {"1", "", false, ""},
	} {
		changed, err := s.MarkCause(t.Context(), "web", step.run, smolvm.StateRunning, step.cause)
		if vm := mustGet(t, s, "web"); err != nil || changed != step.changed || vm.State != smolvm.StateRunning || vm.Cause != step.want {
			t.Errorf("%+v: %t, %v; it is %s (%s)", step, changed, err, vm.State, vm.Cause)
		}
	}
	if _, err := s.MarkCause(t.Context(), "web", "1", smolvm.StatePaused, "full"); err != nil {
		t.Fatal(err)
	}
	if changed, err := s.MarkCause(t.Context(), "web", "1", smolvm.StateRunning, ""); err != nil || changed {
		t.Errorf("of a VM that is paused: %t, %v", changed, err)
	}
}

// A start that did not come to run the VM leaves only its cause.
func TestMarkNotStarted(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	want := mustCreate(t, s, newVM("web"))
	if err := s.MarkNotStarted(t.Context(), "web", smolvm.StateCreated, "no memory"); err != nil {
		t.Fatal(err)
	}
	want.Cause = "no memory"
	if diff := cmp.Diff(want, mustGet(t, s, "web"), equalAddrs); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestStateRules(t *testing.T) {
	t.Parallel()
	// mark brings a VM into a state by force.
	mark := func(t *testing.T, s *Store, id string, state smolvm.VMState) {
		t.Helper()
		mustCreate(t, s, newVM(id))
		if err := s.SetState(t.Context(), id, smolvm.States(), state); err != nil {
			t.Fatal(err)
		}
	}
	operations := map[string]struct {
		allowed []smolvm.VMState
		do      func(s *Store, id string) error
	}{
		"start": {
			[]smolvm.VMState{smolvm.StateCreated, smolvm.StateStopped, smolvm.StateError},
			func(s *Store, id string) error {
				return s.MarkStarted(t.Context(), id, Started{Run: "r", At: startedAt})
			},
		},
		"pause": {
			[]smolvm.VMState{smolvm.StateRunning},
			func(s *Store, id string) error {
				return s.SetState(t.Context(), id, []smolvm.VMState{smolvm.StateRunning}, smolvm.StatePaused)
			},
		},
	}
	for name, op := range operations {
		s := openTemp(t, Options{})
		for _, state := range smolvm.States() {
			id := "in-" + string(state)
			mark(t, s, id, state)
			err := op.do(s, id)
			if slices.Contains(op.allowed, state) {
				if err != nil {
					t.Errorf("%s of a VM that is %s: %v", name, state, err)
				}
				continue
			}
			if !errors.Is(err, smolvm.ErrInvalidState) || !strings.Contains(err.Error(), string(state)) {
				t.Errorf("%s of a VM that is %s: error = %v, want ErrInvalidState that names the state", name, state, err)
			}
			if got := mustGet(t, s, id).State; got != state {
				t.Errorf("%s of a VM that is %s made it %s", name, state, got)
			}
		}
	}
}
