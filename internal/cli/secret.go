package cli

import (
	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

// secretFlags are the flags that describe the secrets of a new VM.
type secretFlags struct {
	secrets []smolvm.Secret
	err     error // of the first flag that is malformed
}

func (f *secretFlags) register(cmd *cobra.Command) {
	cmd.Flags().Func("secret", "let programs use a secret that they don't see: `NAME=SOURCE@HOST[:PORT][,HOST...]`, where SOURCE is env:NAME or file:PATH (repeatable)",
		func(text string) error {
			secret, err := smolvm.ParseSecret(text)
			if err != nil && f.err == nil {
				f.err = err // kept back, as the error of a flag repeats its text, and that may be a secret
			}
			f.secrets = append(f.secrets, secret)
			return nil
		})
	complete(cmd, "secret", words())
}

// all returns the secrets of the flags.
func (f *secretFlags) all() ([]smolvm.Secret, error) {
	if f.err != nil {
		return nil, withHint(&usageError{f.err}, "write --secret NAME=SOURCE@HOST, as in --secret GH_TOKEN=env:GITHUB_TOKEN@api.github.com")
	}
	return f.secrets, nil
}

// withoutSecretsFlag adds the flag by which a VM that is made of a saved one gets no secrets.
func withoutSecretsFlag(cmd *cobra.Command, without *bool) {
	cmd.Flags().BoolVar(without, "without-secrets", false, "give it none of the secrets of the VM that was saved")
}
