package store

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/smolvm/smolvm"
)

var report = smolvm.StartReport{
	Method: smolvm.StartClone, Source: "0123", Backend: "qemu", Accelerator: "tcg",
	Timeline: []smolvm.Phase{{Name: "vmm", Duration: 40 * time.Millisecond}},
	Warnings: []string{"slow"},
}

func startAs(s *Store, t *testing.T, id string, who Identity) error {
	return s.MarkStarted(t.Context(), id, Started{Run: "run of " + id, At: startedAt, Report: report, Identity: who})
}

func TestReport(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	mustCreate(t, s, newVM("web"))
	if got, err := s.Report(t.Context(), "web"); err != nil || got != nil {
		t.Errorf("report of a VM that was never started: %+v, %v", got, err)
	}
	if err := startAs(s, t, "web", Identity{}); err != nil {
		t.Fatal(err)
	}
	got, err := s.Report(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&report, got); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
}

// No two VMs have any part of an identity in common, and a VM that would is not started.
func TestTwins(t *testing.T) {
	t.Parallel()
	full := Identity{BootID: "b", Random: "r", MachineID: "m", HostKey: "h", MAC: "52:54:00:00:00:01"}
	tests := map[string]struct {
		who       Identity
		duplicate bool
	}{
		"another":    {Identity{BootID: "b2", Random: "r2", MachineID: "m2", HostKey: "h2", MAC: "52:54:00:00:00:02"}, false},
		"unknown":    {Identity{}, false},
		"boot id":    {Identity{BootID: "b", Random: "r2"}, true},
		"random":     {Identity{Random: "r"}, true},
		"machine id": {Identity{MachineID: "m"}, true},
		"host key":   {Identity{HostKey: "h"}, true},
		"MAC":        {Identity{MAC: "52:54:00:00:00:01"}, true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openTemp(t, Options{})
			mustCreate(t, s, newVM("first"))
			mustCreate(t, s, newVM("second"))
			if err := startAs(s, t, "first", full); err != nil {
				t.Fatal(err)
			}
			err := startAs(s, t, "second", test.who)
			if errors.Is(err, ErrDuplicateIdentity) != test.duplicate || (err != nil) != test.duplicate {
				t.Errorf("error is %v", err)
			}
			want := smolvm.StateRunning
			if test.duplicate {
				want = smolvm.StateCreated
			}
			if got := mustGet(t, s, "second"); got.State != want {
				t.Errorf("the VM is %s, want %s", got.State, want)
			}
		})
	}
}

// A VM keeps what is its own when it is started again, and what it had is free when it
// is deleted.
func TestIdentityOfOneVM(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	mustCreate(t, s, newVM("a"))
	who := Identity{BootID: "1", MachineID: "m", HostKey: "h"}
	for _, bootID := range []string{"1", "2"} {
		who.BootID = bootID
		if err := startAs(s, t, "a", who); err != nil {
			t.Fatal(err)
		}
		if _, err := s.MarkEnded(t.Context(), "a", "run of a", smolvm.StateStopped, "", startedAt); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.DeleteVM(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, s, newVM("b"))
	if err := startAs(s, t, "b", who); err != nil {
		t.Errorf("the identity of a VM that was deleted is not free: %v", err)
	}
}

func TestPools(t *testing.T) {
	t.Parallel()
	s := openTemp(t, Options{})
	if _, err := s.Pools().Get(t.Context(), "p"); !errors.Is(err, smolvm.ErrPoolNotFound) {
		t.Errorf("a pool that is not there: %v", err)
	}
	config := smolvm.VMConfig{ID: "x", WarmUp: "python3 -c 'import json'"}.WithDefaults()
	for _, size := range []int{2, 5} {
		if err := s.Pools().Set(t.Context(), Pool{ID: "p", Size: size, Config: config}); err != nil {
			t.Fatal(err)
		}
		got, err := s.Pools().Get(t.Context(), "p")
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(Pool{ID: "p", Size: size, Config: config}, got, equalAddrs); diff != "" {
			t.Errorf("pool (-want +got):\n%s", diff)
		}
	}
	if all, err := s.Pools().List(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("pools are %v, %v", all, err)
	}
	for range 2 { // one that is not there is fine
		if err := s.Pools().Delete(t.Context(), "p"); err != nil {
			t.Error(err)
		}
	}
	if all, err := s.Pools().List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("pools are %v, %v", all, err)
	}
}
