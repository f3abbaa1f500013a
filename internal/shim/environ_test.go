package shim

import (
	"slices"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/secret"
)

// A shim does not inherit what it is to keep from the VMM.
func TestEnvironWithout(t *testing.T) {
	t.Setenv("SMOLVM_TEST_TOKEN", "value=with=signs")
	t.Setenv("SMOLVM_TEST_TOKEN_FILE", "other")
	if env := environWithout(nil); !slices.Contains(env, "SMOLVM_TEST_TOKEN=value=with=signs") {
		t.Error("without names it lacks a variable")
	}
	env := environWithout([]string{"SMOLVM_TEST_TOKEN", "SMOLVM_TEST_NOT_SET"})
	if slices.Contains(env, "SMOLVM_TEST_TOKEN=value=with=signs") || !slices.Contains(env, "SMOLVM_TEST_TOKEN_FILE=other") {
		t.Errorf("%q", env)
	}
}

// A shim from before there were secrets refuses an order with some, and takes all others.
func TestProtocolOfSecrets(t *testing.T) {
	t.Parallel()
	config := &network.Config{Egress: &network.Egress{}}
	with, without := Spec{Network: config, Secrets: []secret.Secret{{}}}, Spec{Network: config}
	if got := with.protocol(); got != 5 {
		t.Errorf("an order with secrets is of protocol %d, want 5", got)
	}
	with.Mounts = []smolvm.Mount{{}}
	if got := with.protocol(); got != 6 {
		t.Errorf("an order with mounts is of protocol %d, want 6", got)
	}
	with.Health = &Health{}
	if got := with.protocol(); got != OrderProtocol {
		t.Errorf("an order with checks of health is of protocol %d, want %d", got, OrderProtocol)
	}
	with.Mounts, with.Health = nil, nil
	if got := without.protocol(); got >= with.protocol() {
		t.Errorf("an order without is of protocol %d", got)
	}
}
