package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

// secretConfig is the configuration of a VM with a secret whose value is in a file, which is
// returned too.
func secretConfig(t *testing.T, value string) (config smolvm.VMConfig, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(value+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return smolvm.VMConfig{
		Egress:  &smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow api.example:443/tcp", "allow example.com"}},
		Secrets: []smolvm.Secret{{Name: "API_TOKEN", Source: "file:" + file, Hosts: []string{"API.example"}}},
	}, file
}

const printToken = `echo "$API_TOKEN"`

// Each start, fork and restored VM has a placeholder of its own, and the value, which is kept
// nowhere, has to be there for each.
func TestSecrets(t *testing.T) {
	t.Parallel()
	const value = "value-of-the-secret"
	m := openFake(t)
	ctx := t.Context()
	config, file := secretConfig(t, value)
	vm := mustRun(t, m, config)
	if len(vm.Start.Warnings) > 0 {
		t.Errorf("it warns: %q", vm.Start.Warnings)
	}
	if got := vm.Config.Secrets[0].String(); got != "API_TOKEN=file:"+file+"@api.example" {
		t.Errorf("it is kept as %s", got)
	}
	seen := []string{sh(t, m, vm.ID, printToken)}
	note := func(id string) {
		t.Helper()
		holder := sh(t, m, id, printToken)
		if !strings.HasPrefix(holder, "smolvm_secret_") || slices.Contains(seen, holder) {
			t.Errorf("VM %s has the placeholder %q, after %q", id, holder, seen)
		}
		seen = append(seen, holder)
	}
	forked, err := m.Fork(ctx, vm.ID, smolvm.ForkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	note(forked.Children[0].ID)
	if _, err := m.CreateSnapshot(ctx, vm.ID, smolvm.SnapshotOptions{Name: "kept"}); err != nil {
		t.Fatal(err)
	}
	restored, err := m.RestoreSnapshot(ctx, "kept", smolvm.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	note(restored.ID)
	if _, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	note(vm.ID)
	if found(t, m, value) {
		t.Error("the value is in the data directory")
	}

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	before, err := m.List(ctx, smolvm.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Stop(ctx, vm.ID, smolvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	for what, start := range map[string]func() error{
		"start":   func() error { _, err := m.Start(ctx, vm.ID, smolvm.StartOptions{}); return err },
		"fork":    func() error { _, err := m.Fork(ctx, restored.ID, smolvm.ForkOptions{}); return err },
		"restore": func() error { _, err := m.RestoreSnapshot(ctx, "kept", smolvm.RestoreOptions{}); return err },
	} {
		if err := start(); !errors.Is(err, os.ErrNotExist) || smolvm.HintOf(err) == "" || !strings.Contains(err.Error(), "API_TOKEN") {
			t.Errorf("%s without the file: %v", what, err)
		}
	}
	if forked, err = m.Fork(ctx, restored.ID, smolvm.ForkOptions{WithoutSecrets: true}); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, forked.Children[0].ID, printToken); got != "" || len(forked.Children[0].Config.Secrets) > 0 {
		t.Errorf("a fork without secrets has %q, and %v", got, forked.Children[0].Config.Secrets)
	}
	if err := m.Delete(ctx, forked.Children[0].ID, smolvm.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.RestoreSnapshot(ctx, "kept", smolvm.RestoreOptions{InPlace: true, WithoutSecrets: true}); !errors.Is(err, smolvm.ErrUnsupported) {
		t.Errorf("in place without secrets: %v", err)
	}
	after, err := m.List(ctx, smolvm.ListOptions{})
	if err != nil || len(after) != len(before) {
		t.Errorf("%d VMs, and there were %d: %v", len(after), len(before), err)
	}
	if info, err := m.Get(ctx, vm.ID); err != nil || info.State != smolvm.StateStopped {
		t.Errorf("the VM that was not started is %s, %v", info.State, err)
	}
	if err := m.RemoveSnapshot(ctx, "kept"); err != nil {
		t.Error(err)
	}
}

// A VM from a pool, and a clone of a template, which know of no secrets, have theirs from the
// moment on in which they are somebody's.
func TestSecretsOfFastStarts(t *testing.T) {
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
	config, _ := secretConfig(t, "value")
	for _, want := range [][]smolvm.StartMethod{
		{smolvm.StartPool}, {smolvm.StartPool, smolvm.StartClone}, // as the pool is filled again
	} {
		vm := mustRun(t, m, config)
		if !slices.Contains(want, vm.Start.Method) {
			t.Errorf("it is started by %s, want one of %s", vm.Start.Method, want)
		}
		if got := sh(t, m, vm.ID, printToken); !strings.HasPrefix(got, "smolvm_secret_") {
			t.Errorf("started by %s it has the placeholder %q", vm.Start.Method, got)
		}
	}
	if err := m.RemovePool(ctx, pool.ID); err != nil {
		t.Error(err)
	}
}

// No policy shuts out the host of a secret, and none lets out all else: not at first, not
// while the VM runs, and not in a fork.
func TestPoliciesOfSecrets(t *testing.T) {
	t.Parallel()
	m := openFake(t)
	ctx := t.Context()
	config, _ := secretConfig(t, "value")
	vm := mustRun(t, m, config)
	var invalid *smolvm.ValidationError
	for _, policy := range []smolvm.EgressPolicy{
		{Default: smolvm.EgressDeny, Rules: []string{"allow example.com"}},
		{Default: smolvm.EgressDeny, Rules: []string{"allow api.example:8443"}},
		{Default: smolvm.EgressDeny},
	} {
		other := config
		other.Egress = &policy
		if _, err := m.Create(ctx, other, smolvm.CreateOptions{}); !errors.As(err, &invalid) || invalid.Fields[0].Field != "secrets[0].hosts" {
			t.Errorf("create with %q: %v", policy.Rules, err)
		}
		if _, err := m.SetEgress(ctx, vm.ID, policy); !errors.As(err, &invalid) || smolvm.HintOf(err) == "" {
			t.Errorf("set %q: %v", policy.Rules, err)
		}
		if _, err := m.Fork(ctx, vm.ID, smolvm.ForkOptions{Egress: &policy}); err == nil {
			t.Errorf("fork with %q", policy.Rules)
		}
	}
	for _, otherwise := range []smolvm.EgressDefault{smolvm.EgressAllow, smolvm.EgressDNSOnly} {
		open := smolvm.EgressPolicy{Default: otherwise, Rules: config.Egress.Rules}
		if _, err := m.SetEgress(ctx, vm.ID, open); !errors.As(err, &invalid) {
			t.Errorf("default %s: %v", otherwise, err)
		}
	}
	narrower := smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{"allow api.example:443/tcp"}}
	if _, err := m.SetEgress(ctx, vm.ID, narrower); err != nil {
		t.Error(err)
	}
	if state, err := m.Egress(ctx, vm.ID); err != nil || state.Revision != 2 {
		t.Errorf("%+v, %v", state, err)
	}
}
