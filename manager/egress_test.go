package manager_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/shim"
)

// A VM's policy is kept, is in force at each start, and is changed while the VM runs.
func TestEgress(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	ctx := t.Context()
	first := smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow example.com:443/tcp"}}
	vm := mustRun(t, m, smolvm.VMConfig{Egress: &first})
	inForce := func() int64 {
		t.Helper()
		info, err := m.Get(ctx, vm.ID)
		if err != nil {
			t.Fatal(err)
		}
		status, err := shim.NewClient(filepath.Dir(info.SocketPath)).Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if status.EgressRevision != info.EgressRevision {
			t.Errorf("revision %d is in force, and %d is written down", status.EgressRevision, info.EgressRevision)
		}
		return status.EgressRevision
	}
	if got := inForce(); got != 1 {
		t.Errorf("revision %d, want 1", got)
	}
	for destination, want := range map[string]bool{"https://example.com/": true, "example.com:80": false, "169.254.169.254:80": false} {
		got, err := m.TestEgress(ctx, vm.ID, destination)
		if err != nil || got.Allowed != want || (got.Rule != "") != want || got.Reason == "" || got.Revision != 1 {
			t.Errorf("%s: %+v, %v; want allowed %t", destination, got, err, want)
		}
	}
	second := smolvm.EgressPolicy{Default: smolvm.EgressDNSOnly}
	state, err := m.SetEgress(ctx, vm.ID, second)
	if err != nil || state.Revision != 2 || !reflect.DeepEqual(state.Policy, second) {
		t.Fatalf("%+v, %v", state, err)
	}
	if got := inForce(); got != 2 {
		t.Errorf("revision %d, want 2", got)
	}
	// A bad one names the rule, and changes nothing.
	var wrong *smolvm.ValidationError
	_, err = m.SetEgress(ctx, vm.ID, smolvm.EgressPolicy{Rules: []string{"allow *", "permit *"}})
	if !errors.As(err, &wrong) || wrong.Fields[0].Field != "egress.rules[1]" {
		t.Errorf("a bad rule: %v", err)
	}
	if _, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if state, err = m.SetEgress(ctx, vm.ID, smolvm.EgressPolicy{}); err != nil || state.Revision != 3 {
		t.Fatalf("of a VM that does not run: %+v, %v", state, err)
	}
	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := inForce(); got != 3 {
		t.Errorf("revision %d after a start, want 3", got)
	}
	if got, err := m.Egress(ctx, vm.ID); err != nil || got.Revision != 3 || got.Within != nil {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := m.Create(ctx, smolvm.VMConfig{Egress: &smolvm.EgressPolicy{Rules: []string{"allow a..b"}}}, smolvm.CreateOptions{}); !errors.As(err, &wrong) {
		t.Errorf("a VM with a bad policy: %v", err)
	}
	if _, err := m.Egress(ctx, "nobody"); !errors.Is(err, smolvm.ErrVMNotFound) {
		t.Errorf("of no VM: %v", err)
	}
}

// What is made of a VM has its policy, and can only be given a narrower one.
func TestEgressOfForks(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	ctx := t.Context()
	policy := smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow example.com", "allow example.org"}}
	narrower := smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow example.com:443"}}
	wider := smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow *.example.com"}}
	parent := mustRun(t, m, smolvm.VMConfig{Egress: &policy})
	if _, err := m.Fork(ctx, parent.ID, smolvm.ForkOptions{Egress: &wider}); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("fork with a wider policy: %v", err)
	}
	forked, err := m.Fork(ctx, parent.ID, smolvm.ForkOptions{IDs: []string{"child"}})
	if err != nil {
		t.Fatal(err)
	}
	child := forked.Children[0]
	if !reflect.DeepEqual(child.Config.Egress, &policy) || child.EgressRevision != 1 {
		t.Errorf("a child has %+v, revision %d", child.Config.Egress, child.EgressRevision)
	}
	if _, err := m.SetEgress(ctx, child.ID, wider); !errors.Is(err, smolvm.ErrUnsupported) || smolvm.HintOf(err) == "" {
		t.Errorf("a child is given a wider policy: %v", err)
	}
	if _, err := m.SetEgress(ctx, child.ID, narrower); err != nil {
		t.Error(err)
	}
	if _, err := m.SetEgress(ctx, child.ID, policy); err != nil {
		t.Errorf("back to that of its parent: %v", err)
	}
	// The parent's own may be made wider; the child's limit stays.
	if _, err := m.SetEgress(ctx, parent.ID, smolvm.EgressPolicy{}); err != nil {
		t.Error(err)
	}
	state, err := m.Egress(ctx, child.ID)
	if err != nil || !reflect.DeepEqual(state.Within, &policy) {
		t.Errorf("%+v, %v", state, err)
	}
	snapshot, err := m.CreateSnapshot(ctx, child.ID, smolvm.SnapshotOptions{Name: "kept"})
	if err != nil {
		t.Fatal(err)
	}
	restored, err := m.RestoreSnapshot(ctx, snapshot.Name, smolvm.RestoreOptions{Egress: &narrower})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(restored.Config.Egress, &narrower) {
		t.Errorf("a restored VM has %+v", restored.Config.Egress)
	}
	if err := m.RemoveSnapshot(ctx, snapshot.Name); err != nil {
		t.Error(err)
	}
	if _, err := m.SetEgress(ctx, restored.ID, smolvm.EgressPolicy{}); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("a restored VM is given a wider policy: %v", err)
	}
}

// A VM that stood by, and a clone of a template, have the policy from the moment on in which they
// are somebody's. One whose warm-up is to run under it is none of the two.
func TestEgressOfFastStarts(t *testing.T) {
	t.Parallel()
	m := openFakeFast(t)
	ctx := t.Context()
	if _, err := m.BuildTemplate(ctx, smolvm.TemplateOptions{}); err != nil {
		t.Fatal(err)
	}
	pool, err := m.SetPool(ctx, smolvm.PoolOptions{Size: 1})
	if err != nil {
		t.Fatal(err)
	}
	policy := smolvm.EgressPolicy{Default: smolvm.EgressDeny}
	for _, test := range []struct {
		warmUp string
		want   []smolvm.StartMethod
	}{
		{"", []smolvm.StartMethod{smolvm.StartPool}},
		{"", []smolvm.StartMethod{smolvm.StartPool, smolvm.StartClone}}, // as the pool is filled again
		{"true", []smolvm.StartMethod{smolvm.StartBoot}},
	} {
		vm := mustRun(t, m, smolvm.VMConfig{Egress: &policy, WarmUp: test.warmUp})
		if !slices.Contains(test.want, vm.Start.Method) {
			t.Errorf("with warm-up %q it is started by %s, want one of %s", test.warmUp, vm.Start.Method, test.want)
		}
		status, err := shim.NewClient(filepath.Dir(vm.SocketPath)).Status(ctx)
		if err != nil || status.EgressRevision != 1 {
			t.Errorf("started by %s: revision %d, %v; want 1", vm.Start.Method, status.EgressRevision, err)
		}
	}
	if err := m.RemovePool(ctx, pool.ID); err != nil {
		t.Error(err)
	}
}

// A snapshot says what a program must know of to restore it, and no more: one that does not
// know of policies, or of raw disks, refuses those that have them.
func TestFormatOfSnapshots(t *testing.T) {
	t.Parallel()
	policy := &smolvm.EgressPolicy{Default: smolvm.EgressDeny}
	for _, test := range []struct {
		name   string
		kind   kind
		egress *smolvm.EgressPolicy
		want   int
	}{
		{"neither", fakeKind, nil, 1},
		{"raw disk", rawFakeKind, nil, 2},
		{"policy", fakeKind, policy, 3},
		{"raw disk and policy", rawFakeKind, policy, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			m := openFakeKind(t, test.kind)
			vm := mustRun(t, m, smolvm.VMConfig{Egress: test.egress})
			if _, err := m.CreateSnapshot(t.Context(), vm.ID, smolvm.SnapshotOptions{Name: "taken"}); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(filepath.Join(m.DataDir(), "snapshots", "taken", "snapshot.json"))
			if err != nil {
				t.Fatal(err)
			}
			var saved struct{ Meta struct{ Format int } }
			if err := json.Unmarshal(text, &saved); err != nil {
				t.Fatal(err)
			}
			if saved.Meta.Format != test.want {
				t.Errorf("the format is %d, want %d", saved.Meta.Format, test.want)
			}
			restored, err := m.RestoreSnapshot(t.Context(), "taken", smolvm.RestoreOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(restored.Config.Egress, test.egress) {
				t.Errorf("the restored VM has policy %+v, want %+v", restored.Config.Egress, test.egress)
			}
			if err := m.RemoveSnapshot(t.Context(), "taken"); err != nil {
				t.Error(err)
			}
		})
	}
}
