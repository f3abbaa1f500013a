package smolvm

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
)

// Limits of [VMConfig].Secrets: how many a VM may have, how many hosts one may be for, and how
// long, in bytes, a value may be.
const (
	MaxSecrets     = 32
	MaxSecretHosts = 16
	MaxSecretValue = 8 << 10
)

// SecretHTTPSPort is the port of a secret's host that names none.
const SecretHTTPSPort = 443

// Secret is a value that a guest's programs use and never see. In the guest, the variable Name
// has a placeholder. In the headers of requests by HTTPS to one of the hosts, and nowhere else,
// the placeholder is replaced by the value, outside the guest. docs/networking.md says how.
type Secret struct {
	// Name is the variable's name in the guest.
	Name string `json:"name"`
	// Source says where the value comes from, each time the VM starts: "env:NAME" is a
	// variable of the process that starts the VM, "file:PATH" a file that it can read. A line
	// break at its end does not count. The value itself is stored nowhere.
	Source string `json:"source"`
	// Hosts are the names of the servers that get the value, each with or without a port, as
	// in "api.github.com" or "git.example.com:8443". Without, it is 443.
	Hosts []string `json:"hosts"`
}

// ParseSecret reads a secret: NAME=SOURCE@HOST[:PORT][,HOST...], as in
// "GH_TOKEN=env:GITHUB_TOKEN@api.github.com". What is wrong with its parts, [VMConfig.Validate]
// says.
func ParseSecret(text string) (Secret, error) {
	name, rest, ok := strings.Cut(text, "=")
	at := strings.LastIndexByte(rest, '@')
	if !ok || at < 0 {
		// The text is not repeated: it may be the value itself.
		return Secret{}, fmt.Errorf("a secret is NAME=SOURCE@HOST, as in GH_TOKEN=env:GITHUB_TOKEN@api.github.com")
	}
	secret := Secret{Name: name, Source: rest[:at], Hosts: strings.Split(rest[at+1:], ",")}
	if problems := secret.problems("secret"); len(problems) > 0 {
		return Secret{}, &ValidationError{Fields: problems}
	}
	return secret.withDefaults(), nil
}

// String returns the secret's text, which [ParseSecret] reads.
func (s Secret) String() string {
	return s.Name + "=" + s.Source + "@" + strings.Join(s.Hosts, ",")
}

// The kinds of sources, with what is before their names.
const (
	secretFromEnv  = "env:"
	secretFromFile = "file:"
)

// Variable returns the name of the variable that the value comes from; ok is false if it comes
// from elsewhere.
func (s Secret) Variable() (name string, ok bool) { return strings.CutPrefix(s.Source, secretFromEnv) }

// File returns the path of the file that the value comes from; ok is false if it comes from
// elsewhere.
func (s Secret) File() (path string, ok bool) { return strings.CutPrefix(s.Source, secretFromFile) }

// HostPort splits one of the hosts of a secret into name and port.
func (s Secret) HostPort(i int) (name string, port uint16, err error) {
	return splitSecretHost(s.Hosts[i])
}

// splitSecretHost reads NAME[:PORT].
func splitSecretHost(text string) (name string, port uint16, err error) {
	name, port = text, SecretHTTPSPort
	if strings.Contains(text, ":") {
		host, number, err := net.SplitHostPort(text)
		if err != nil {
			return "", 0, fmt.Errorf("%q is no NAME or NAME:PORT", text)
		}
		parsed, err := strconv.ParseUint(number, 10, 16)
		if err != nil || parsed == 0 {
			return "", 0, fmt.Errorf("%q has no port from 1 to 65535", text)
		}
		name, port = host, uint16(parsed)
	}
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	if problem := secretNameProblem(name); problem != "" {
		return "", 0, fmt.Errorf("%q %s", text, problem)
	}
	const plainHTTP = 80
	if port == plainHTTP {
		return "", 0, fmt.Errorf("%q is a port of HTTP without TLS, by which no secret is sent", text)
	}
	return name, port, nil
}

// secretNameProblem says why a name is none that a server can prove to have.
func secretNameProblem(name string) string {
	const maxName, maxLabel = 253, 63
	labels := strings.Split(name, ".")
	last := labels[len(labels)-1]
	switch {
	case name == "":
		return "is no name"
	case strings.Contains(name, "*"):
		return "has a wildcard; name each host that gets the secret"
	case len(name) > maxName:
		return fmt.Sprintf("has %d bytes; at most %d are allowed", len(name), maxName)
	case strings.Trim(last, digits) == "" || strings.Contains(name, ":"):
		return "is an address; name the host as its certificate does"
	}
	for _, label := range labels {
		if len(label) > maxLabel || !madeOf(label, lowerCase+digits, "-_") {
			return "is no name as DNS has it; write labels of letters, digits and '-', and others as in xn--bcher-kva.example"
		}
	}
	return ""
}

// withDefaults returns s with its hosts as names are compared, and an absolute path.
func (s Secret) withDefaults() Secret {
	s.Hosts = slices.Clone(s.Hosts)
	for i, host := range s.Hosts {
		name, port, err := splitSecretHost(host)
		switch {
		case err != nil: // which Validate says
		case port == SecretHTTPSPort:
			s.Hosts[i] = name
		default:
			s.Hosts[i] = net.JoinHostPort(name, strconv.Itoa(int(port)))
		}
	}
	if path, ok := s.File(); ok {
		s.Source = secretFromFile + absolute(path)
	}
	return s
}

// problems returns what is wrong with a secret.
func (s Secret) problems(field string) []FieldError {
	v := validator{}
	v.check(isVariable(s.Name), field+".name",
		"%q is not the name of a variable; use letters, digits and '_', not a digit first", s.Name)
	variable, fromEnv := s.Variable()
	path, fromFile := s.File()
	// What is no source may be the value itself, so it is not repeated.
	v.check(fromEnv && isVariable(variable) || fromFile && path != "" && !strings.ContainsRune(path, 0), field+".source",
		"is neither env:NAME nor file:PATH")
	v.check(len(s.Hosts) > 0, field+".hosts", "are missing; name the host that gets the secret")
	v.check(len(s.Hosts) <= MaxSecretHosts, field+".hosts", "%d are too many; at most %d are allowed", len(s.Hosts), MaxSecretHosts)
	for _, host := range s.Hosts {
		if _, _, err := splitSecretHost(host); err != nil {
			v.add(field+".hosts", "%s", err)
		}
	}
	return v.fields
}

// validateSecrets checks the secrets of a VM, and what they need of its other options.
func (c VMConfig) validateSecrets(v *validator) {
	if len(c.Secrets) == 0 {
		return
	}
	v.check(len(c.Secrets) <= MaxSecrets, "secrets", "%d are too many; at most %d are allowed", len(c.Secrets), MaxSecrets)
	v.check(c.UsesImage(), "secrets", "a VM with its own kernel has no agent that takes placeholders")
	v.check(c.Egress != nil && c.Egress.Default == EgressDeny, "secrets",
		"need an egress policy that denies by default, or a program in the guest could give away what a server answers")
	for i, secret := range c.Secrets {
		field := fmt.Sprintf("secrets[%d]", i)
		v.fields = append(v.fields, secret.problems(field)...)
		_, isSet := c.Env[secret.Name]
		v.check(!isSet, field+".name", "%s is a variable of env too", secret.Name)
		for _, other := range c.Secrets[:i] {
			v.check(other.Name != secret.Name, field+".name", "there are two secrets %s", secret.Name)
		}
	}
}

// secretsWithDefaults returns secrets with what they leave out filled in.
func secretsWithDefaults(secrets []Secret) []Secret {
	secrets = slices.Clone(secrets)
	for i := range secrets {
		secrets[i] = secrets[i].withDefaults()
	}
	return secrets
}
