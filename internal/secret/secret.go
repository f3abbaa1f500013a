// Package secret finds out the values of secrets when a VM starts, and checks that its policy
// lets them get to their hosts. A value is in memory, and in what one process sends to another
// over a pipe or a socket; nothing writes it down.
package secret

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

// Value is the value of a secret. However it is formatted or logged, it is not shown; as JSON
// it is, for orders.
type Value string

// hidden is shown in place of a value.
const hidden = "[secret]"

// String implements [fmt.Stringer].
func (Value) String() string { return hidden }

// Format implements [fmt.Formatter].
func (Value) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, hidden) }

// LogValue implements [slog.LogValuer].
func (Value) LogValue() slog.Value { return slog.StringValue(hidden) }

// Reveal returns the value itself.
func (v Value) Reveal() string { return string(v) }

// Secret is a secret of a VM that is being started.
type Secret struct {
	Name  string `json:"name"`
	Value Value  `json:"value"`
	// Hosts are names with ports.
	Hosts []Host `json:"hosts"`
}

// Host is a server that gets a secret.
type Host struct {
	Name string `json:"name"`
	Port uint16 `json:"port"`
}

// String returns the host as NAME:PORT.
func (h Host) String() string { return net.JoinHostPort(h.Name, strconv.Itoa(int(h.Port))) }

// Resolve returns the secrets of a configuration with their values, as this process has them
// now. The error says which can't be had, and never what is in it.
func Resolve(secrets []smolvm.Secret) ([]Secret, error) {
	var resolved []Secret
	for _, secret := range secrets {
		value, err := valueOf(secret)
		if err != nil {
			return nil, err
		}
		hosts, err := hostsOf(secret)
		if err != nil {
			return nil, err
		}
		resolved = append(resolved, Secret{Name: secret.Name, Value: value, Hosts: hosts})
	}
	return resolved, nil
}

// Variables returns the names of the variables of this process that have values of secrets.
func Variables(secrets []smolvm.Secret) []string {
	var names []string
	for _, secret := range secrets {
		if name, ok := secret.Variable(); ok {
			names = append(names, name)
		}
	}
	return names
}

func hostsOf(secret smolvm.Secret) ([]Host, error) {
	var hosts []Host
	for i := range secret.Hosts {
		name, port, err := secret.HostPort(i)
		if err != nil {
			return nil, fmt.Errorf("secret %s: host %w", secret.Name, err)
		}
		hosts = append(hosts, Host{name, port})
	}
	return hosts, nil
}

func valueOf(secret smolvm.Secret) (Value, error) {
	text, err := read(secret)
	if err != nil {
		return "", err
	}
	text = strings.TrimSuffix(strings.TrimSuffix(text, "\n"), "\r")
	if problem := problemOf(text); problem != "" {
		return "", &smolvm.Error{
			Hint: "a secret is one line of text, such as a token",
			Err:  fmt.Errorf("secret %s: what %s has %s", secret.Name, secret.Source, problem),
		}
	}
	return Value(text), nil
}

func read(secret smolvm.Secret) (string, error) {
	if name, ok := secret.Variable(); ok {
		value, ok := os.LookupEnv(name)
		if !ok {
			return "", &smolvm.Error{
				Hint: fmt.Sprintf("values of secrets are kept nowhere: set %s where the VM is started from", name),
				Err:  fmt.Errorf("secret %s: the variable %s is not set", secret.Name, name),
			}
		}
		return value, nil
	}
	path, ok := secret.File()
	if !ok {
		return "", fmt.Errorf("secret %s: its source is neither env:NAME nor file:PATH", secret.Name)
	}
	text, err := readFile(path)
	if err != nil {
		return "", &smolvm.Error{
			Hint: "values of secrets are kept nowhere: the file has to be there each time the VM is started",
			Err:  fmt.Errorf("secret %s: %w", secret.Name, err),
		}
	}
	return text, nil
}

// readFile reads a file that may be any: no more than a value may have, and a line break.
func readFile(path string) (string, error) {
	// What is no file may keep its reader waiting.
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", path)
	}
	if err != nil {
		return "", err
	}
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(io.LimitReader(file, smolvm.MaxSecretValue+3))
	return string(text), cmp.Or(err, file.Close())
}

// problemOf says why a text can't be in a header (RFC 9110, section 5.5).
func problemOf(text string) string {
	switch {
	case text == "":
		return "is empty"
	case len(text) > smolvm.MaxSecretValue:
		return fmt.Sprintf("is longer than %d bytes", smolvm.MaxSecretValue)
	case strings.ContainsFunc(text, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }):
		return "has line breaks or control characters in it"
	case strings.TrimSpace(text) != text:
		return "begins or ends with a blank"
	}
	return ""
}

// Check returns an error if a policy does not let a VM have secrets: it has to deny by default,
// and to allow each of their hosts. The error is a [*smolvm.ValidationError].
func Check(secrets []smolvm.Secret, policy network.Policy) error {
	if len(secrets) == 0 {
		return nil
	}
	invalid := &smolvm.ValidationError{}
	add := func(field, format string, args ...any) {
		invalid.Fields = append(invalid.Fields, smolvm.FieldError{Field: field, Problem: fmt.Sprintf(format, args...)})
	}
	if policy.Default != network.DefaultDeny {
		add("egress.default", "is not deny, as it has to be for a VM with secrets")
	}
	for i, secret := range secrets {
		hosts, err := hostsOf(secret)
		if err != nil {
			return err
		}
		for _, host := range hosts {
			if why := shutOut(policy, host); why != nil {
				add(fmt.Sprintf("secrets[%d].hosts", i), "%s can't be reached, so %s would not get there: %s; add `allow %s/tcp`",
					host, secret.Name, why, host)
			}
		}
	}
	if len(invalid.Fields) > 0 {
		return invalid
	}
	return nil
}

// shutOut returns why a policy lets no flow get to a host by its name; nil: it lets one.
func shutOut(policy network.Policy, host Host) error {
	destination, err := network.ParseDestination(host.String() + "/tcp")
	if err != nil {
		return err
	}
	// The name has to be resolved, too, and nothing but a rule about it does that. So this holds
	// for hosts in private networks as well, which a rule about their addresses has to open.
	if verdict, reason := policy.Test(destination); !verdict.Allowed {
		return errors.New(reason)
	}
	return nil
}
