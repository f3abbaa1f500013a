package manager

import (
	"fmt"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/secret"
)

// checkEgress checks a configuration's egress policy, and that it lets its secrets get to their
// hosts. What is wrong is a [*smolvm.ValidationError].
func checkEgress(config smolvm.VMConfig) error {
	if config.Egress == nil {
		return nil // what secrets lack then, the configuration itself tells
	}
	policy, err := network.PolicyOf(*config.Egress)
	if err != nil {
		return err
	}
	if config.Egress.Default != smolvm.EgressDeny {
		return nil // as before
	}
	return secret.Check(config.Secrets, policy)
}

// checkSecrets returns an error if a policy takes from a VM what its secrets need.
func checkSecrets(config smolvm.VMConfig, policy network.Policy) error {
	err := secret.Check(config.Secrets, policy)
	if err == nil {
		return nil
	}
	return &smolvm.Error{
		Hint: "a VM's secrets and their hosts stay as they are: allow the hosts, or make another VM without the secrets",
		Err:  err,
	}
}

// findSecrets returns an error if a value of a secret can't be had now, before anything is done
// that a start would only then fail after.
func findSecrets(secrets []smolvm.Secret) error {
	if _, err := secret.Resolve(secrets); err != nil {
		return fmt.Errorf("find the values of its secrets: %w", err)
	}
	return nil
}
