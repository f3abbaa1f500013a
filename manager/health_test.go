package manager_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
)

// checked is the configuration of a VM whose check succeeds while a file is there.
func checked(retries int) smolvm.VMConfig {
	return smolvm.VMConfig{Healthcheck: &smolvm.Healthcheck{
		Command: []string{"echo looked; test -f /tmp/works"}, Shell: true, Interval: 20 * time.Millisecond, Retries: retries,
	}}
}

// neverUnhealthy is more failures than any test has time for.
const neverUnhealthy = 1 << 30

// awaitEvent returns the first event of a VM with an action, whenever it was.
func awaitEvent(t *testing.T, m *manager.Manager, id, action string) smolvm.Event {
	t.Helper()
	for event, err := range m.Watch(t.Context(), smolvm.WatchOptions{VM: id, After: -1}) {
		if err != nil {
			t.Fatal(err)
		}
		if event.Action == action {
			return event
		}
	}
	t.Fatal("the watch has ended")
	return smolvm.Event{}
}

// A VM is starting until its check succeeds, and unhealthy when it has failed often enough; who
// waits, looks or lists is told, and events have the changes.
func TestHealth(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	vm := mustRun(t, m, checked(neverUnhealthy))
	if got := vm.Config.Healthcheck; got.Timeout != 30*time.Second || got.StartInterval != 5*time.Second {
		t.Errorf("the defaults are not filled in: %+v", got)
	}
	waited := make(chan error, 1)
	go func() {
		_, err := m.WaitHealthy(t.Context(), vm.ID)
		waited <- err
	}()
	info := awaitResult(t, m, vm.ID)
	if h := info.Health; h.Status != smolvm.HealthStarting || h.Results[0].ExitCode != 1 || h.Results[0].Output != "looked\n" || h.FailingStreak < 1 {
		t.Errorf("before it works its health is %+v", h)
	}
	sh(t, m, vm.ID, "touch /tmp/works")
	if err := <-waited; err != nil {
		t.Errorf("wait: %v", err)
	}
	awaitEvent(t, m, vm.ID, "healthy")
	listed, err := m.List(t.Context(), smolvm.ListOptions{})
	if err != nil || len(listed) != 1 || listed[0].Health == nil || listed[0].Health.Status != smolvm.HealthHealthy || listed[0].Health.FailingStreak != 0 {
		t.Errorf("the list has %+v (%v)", listed, err)
	}

	// A fork begins anew: what works in its origin need not work in it.
	forked, err := m.Fork(t.Context(), vm.ID, smolvm.ForkOptions{Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	child := forked.Children[0].ID
	if got, err := m.WaitHealthy(t.Context(), child); err != nil || got.Health == nil || got.Health.Status != smolvm.HealthHealthy {
		t.Errorf("the health of a fork is %+v (%v)", got.Health, err)
	}
	awaitEvent(t, m, child, "healthy")

	if _, err := m.Stop(t.Context(), vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	stopped, err := m.Get(t.Context(), vm.ID)
	if err != nil || stopped.Health != nil {
		t.Errorf("a stopped VM has health %+v (%v)", stopped.Health, err)
	}
}

// awaitResult returns what is known of a VM when a check has been made.
func awaitResult(t *testing.T, m *manager.Manager, id string) smolvm.VMInfo {
	t.Helper()
	ticker := time.NewTicker(5 * time.Millisecond) // results are no events
	defer ticker.Stop()
	for {
		info, err := m.Get(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if info.Health != nil && len(info.Health.Results) > 0 {
			return info
		}
		select {
		case <-ticker.C:
		case <-t.Context().Done():
			t.Fatal("no check is made")
		}
	}
}

// Waiting for health fails closed.
func TestWaitHealthyFails(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	wait := func(ctx context.Context, id string) error {
		_, err := m.WaitHealthy(ctx, id)
		return err
	}
	unhealthy := mustRun(t, m, checked(2))
	err := wait(t.Context(), unhealthy.ID)
	if !errors.Is(err, smolvm.ErrUnhealthy) || !strings.Contains(err.Error(), "exit status 1: looked") || smolvm.CodeOf(err) != smolvm.CodeUnhealthy {
		t.Errorf("an unhealthy VM: %v", err)
	}
	if event := awaitEvent(t, m, unhealthy.ID, "unhealthy"); !strings.Contains(event.Detail, "checks failed in a row") {
		t.Errorf("the event is %+v", event)
	}
	sh(t, m, unhealthy.ID, "touch /tmp/works")
	awaitEvent(t, m, unhealthy.ID, "healthy")

	without := mustRun(t, m, smolvm.VMConfig{})
	if err := wait(t.Context(), without.ID); !errors.Is(err, smolvm.ErrInvalidState) || !strings.Contains(err.Error(), "no health check") {
		t.Errorf("a VM without a check: %v", err)
	}
	if err := wait(t.Context(), "nobody"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("no VM: %v", err)
	}
	if err := wait(t.Context(), mustCreate(t, m, checked(1)).ID); !errors.Is(err, smolvm.ErrInvalidState) {
		t.Errorf("a VM that does not run: %v", err)
	}

	never := mustRun(t, m, checked(neverUnhealthy))
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan error, 1)
	go func() { waited <- wait(ctx, never.ID) }()
	awaitResult(t, m, never.ID)
	cancel()
	if err := <-waited; !errors.Is(err, context.Canceled) {
		t.Errorf("a wait that was given up: %v", err)
	}
	for name, victim := range map[string]func(smolvm.VMInfo) int{
		"the VMM is killed":  func(vm smolvm.VMInfo) int { return vm.PID },
		"the shim is killed": func(vm smolvm.VMInfo) int { return vm.ShimPID },
	} {
		vm := mustRun(t, m, checked(neverUnhealthy))
		go func() { waited <- wait(t.Context(), vm.ID) }()
		awaitResult(t, m, vm.ID)
		if err := syscall.Kill(victim(vm), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := <-waited; !errors.Is(err, smolvm.ErrInvalidState) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A guest that is held is not checked, and what it was doing then does not count.
func TestHealthOfHeldGuest(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	config := checked(1)
	config.Healthcheck.Command = []string{"while test -f /tmp/hangs; do sleep 0.01; done"}
	config.Healthcheck.Timeout = 250 * time.Millisecond
	vm := mustRun(t, m, config)
	if _, err := m.WaitHealthy(t.Context(), vm.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Pause(t.Context(), vm.ID); err != nil {
		t.Fatal(err)
	}
	before, err := m.Get(t.Context(), vm.ID)
	if err != nil || before.Health == nil {
		t.Fatalf("a paused VM has no health: %v", err)
	}
	held, err := m.CreateSnapshot(t.Context(), vm.ID, smolvm.SnapshotOptions{Name: "held"})
	if err != nil {
		t.Fatal(err)
	}
	// Longer than any check may take.
	ctx, cancel := context.WithTimeout(t.Context(), 2*config.Healthcheck.Timeout)
	defer cancel()
	<-ctx.Done()
	after, err := m.Get(t.Context(), vm.ID)
	if err != nil || after.Health == nil || after.Health.Status != smolvm.HealthHealthy || after.Health.FailingStreak != 0 ||
		!slices.Equal(before.Health.Results, after.Health.Results) {
		t.Errorf("while it was held its health became %+v (%v)", after.Health, err)
	}
	if _, err := m.Resume(t.Context(), vm.ID); err != nil {
		t.Fatal(err)
	}
	restored, err := m.RestoreSnapshot(t.Context(), held.Name, smolvm.RestoreOptions{ID: "restored"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.WaitHealthy(t.Context(), restored.ID); err != nil {
		t.Errorf("a restored VM: %v", err)
	}
	if err := m.Delete(t.Context(), restored.ID, smolvm.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if err := m.RemoveSnapshot(t.Context(), held.Name); err != nil {
		t.Error(err)
	}
	sh(t, m, vm.ID, "touch /tmp/hangs")
	if event := awaitEvent(t, m, vm.ID, "unhealthy"); !strings.Contains(event.Detail, "took longer than 250ms") {
		t.Errorf("the event of a check that hangs is %+v", event)
	}
}
