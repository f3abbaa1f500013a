package session

import (
	"errors"
	"fmt"
	"maps"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/network/intercept"
	"github.com/smolvm/smolvm/internal/secret"
)

// secretsSetter is a network that puts secrets into the guest's flows.
type secretsSetter interface {
	SetSecrets(secrets *intercept.Interceptor)
}

// placeholders is what the guest has in place of its secrets.
type placeholders struct {
	env       map[string]string
	authority []byte
}

// useSecrets gives the guest an authority and placeholders of its own, and the network the
// secrets. Whatever the guest was before, it has no other ones.
func (s *Session) useSecrets() error {
	if len(s.spec.Secrets) == 0 {
		return nil
	}
	fail := func(err error) error { return fmt.Errorf("use the VM's secrets: %w", err) }
	setter, ok := s.network.(secretsSetter)
	switch {
	case !ok:
		return fail(fmt.Errorf("%w: the VM's network can't have any", smolvm.ErrUnsupported))
	case s.spec.Network.Egress == nil: // and so lets everything out
		return fail(errors.New("there is no egress policy"))
	case s.spec.Hello == nil:
		return fail(fmt.Errorf("%w: the guest has no agent that takes placeholders", smolvm.ErrUnsupported))
	}
	holders := &placeholders{env: map[string]string{}}
	var secrets []intercept.Secret
	for _, one := range s.spec.Secrets {
		placeholder := intercept.NewPlaceholder()
		holders.env[one.Name] = placeholder
		secrets = append(secrets, intercept.Secret{
			Name: one.Name, Placeholder: placeholder, Value: one.Value.Reveal(), Targets: targetsOf(one),
		})
	}
	made, err := intercept.New(intercept.Options{Secrets: secrets, Log: s.log})
	if err != nil {
		return fail(err)
	}
	holders.authority = made.Certificate()
	setter.SetSecrets(made)
	s.placeholders = holders
	return nil
}

func targetsOf(one secret.Secret) []intercept.Target {
	var targets []intercept.Target
	for _, host := range one.Hosts {
		targets = append(targets, intercept.Target{Host: host.Name, Port: host.Port})
	}
	return targets
}

// addTo tells a guest of its placeholders.
func (p *placeholders) addTo(hello *wire.Hello) {
	if p == nil {
		return
	}
	env := maps.Clone(hello.Env)
	if env == nil {
		env = map[string]string{}
	}
	maps.Copy(env, p.env)
	hello.Env, hello.Authority = env, p.authority
}

// checkAuthority warns if the guest does not know its authority.
func (s *Session) checkAuthority(answer wire.Answer) {
	if s.placeholders != nil && !answer.Authority {
		s.warn("the agent in the guest's image is older than secrets: no program in the guest trusts the VM's authority; build the image anew")
	}
}
