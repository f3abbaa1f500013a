package session

import (
	"errors"
	"log/slog"
	"maps"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/intercept"
	"github.com/smolvm/smolvm/internal/secret"
	"github.com/smolvm/smolvm/internal/shim"
)

// openNetwork is a network that lets everything out, and secretNetwork one that takes secrets.
type (
	openNetwork   struct{ network.Attachment }
	secretNetwork struct {
		network.Attachment
		secrets *intercept.Interceptor
	}
)

func (n *secretNetwork) SetSecrets(secrets *intercept.Interceptor) { n.secrets = secrets }

// Secrets are refused where they would not be kept to their hosts, and each use of a session has
// an authority and placeholders of its own.
func TestUseSecrets(t *testing.T) {
	t.Parallel()
	config := &network.Config{Egress: &network.Egress{}}
	hello := &wire.Hello{Env: map[string]string{"A": "a"}}
	newSession := func(spec shim.Spec, attached network.Attachment) *Session {
		spec.Secrets = []secret.Secret{{Name: "T", Value: "value", Hosts: []secret.Host{{Name: "a.example", Port: 443}}}}
		s := New(spec, Options{Log: slog.New(slog.DiscardHandler)})
		s.network = attached
		return s
	}
	for what, s := range map[string]*Session{
		"no network":      newSession(shim.Spec{Hello: hello}, nil),
		"another network": newSession(shim.Spec{Hello: hello, Network: config}, openNetwork{}),
		"no agent":        newSession(shim.Spec{Network: config}, &secretNetwork{}),
	} {
		if err := s.useSecrets(); !errors.Is(err, smolvm.ErrUnsupported) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := newSession(shim.Spec{Hello: hello, Network: &network.Config{}}, &secretNetwork{}).useSecrets(); err == nil {
		t.Error("secrets without an egress policy")
	}
	attached := &secretNetwork{}
	s := newSession(shim.Spec{Hello: hello, Network: config}, attached)
	var before wire.Hello
	for range 2 { // as of a guest that stands by, too
		if err := s.useSecrets(); err != nil {
			t.Fatal(err)
		}
		told := *s.spec.Hello
		s.placeholders.addTo(&told)
		if !strings.HasPrefix(told.Env["T"], "smolvm_secret_") || told.Env["A"] != "a" || !strings.Contains(string(told.Authority), "CERTIFICATE") {
			t.Errorf("the guest is told %+v", told)
		}
		if told.Env["T"] == before.Env["T"] || string(told.Authority) == string(before.Authority) {
			t.Error("it is told the same again")
		}
		if !attached.secrets.Has(intercept.Target{Host: "a.example", Port: 443}) {
			t.Error("the network has no secret")
		}
		before = told
	}
	if !maps.Equal(hello.Env, map[string]string{"A": "a"}) {
		t.Errorf("the order has become %q", hello.Env)
	}
	s.checkAuthority(wire.Answer{Authority: true})
	if len(s.warnings) > 0 {
		t.Errorf("it warns: %q", s.warnings)
	}
	if s.checkAuthority(wire.Answer{}); len(s.warnings) != 1 {
		t.Error("it does not warn of an agent that knows of no authority")
	}
}
