package smolvm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseSecret(t *testing.T) {
	t.Parallel()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ text, want string }{
		{"GH_TOKEN=env:GITHUB_TOKEN@api.github.com", "GH_TOKEN=env:GITHUB_TOKEN@api.github.com"},
		{"T=env:T@API.GitHub.com.:443,b.example:8443", "T=env:T@api.github.com,b.example:8443"},
		{"T=file:/run/secrets/a@b@xn--bcher-kva.example", "T=file:/run/secrets/a@b@xn--bcher-kva.example"},
		{"T=file:token@localhost", "T=file:" + filepath.Join(here, "token") + "@localhost"},
	} {
		got, err := ParseSecret(test.text)
		if err != nil || got.String() != test.want {
			t.Errorf("%s: %s, %v; want %s", test.text, got, err, test.want)
			continue
		}
		if again, err := ParseSecret(got.String()); err != nil || again.String() != got.String() {
			t.Errorf("%s: %s, %v the second time", got, again, err)
		}
	}
	for text, want := range map[string]string{
		"":                        "NAME=SOURCE@HOST",
		"T":                       "NAME=SOURCE@HOST",
		"T=env:T":                 "NAME=SOURCE@HOST",
		"T=ghp_value@a.example":   "env:NAME",
		"T=env:@a.example":        "env:NAME",
		"T=env:A B@a.example":     "env:NAME",
		"T=file:@a.example":       "env:NAME",
		"1T=env:T@a.example":      "variable",
		"=env:T@a.example":        "variable",
		"T=env:T@":                "is no name",
		"T=env:T@a.example,":      "is no name",
		"T=env:T@*.example":       "wildcard",
		"T=env:T@a..example":      "no name as DNS",
		"T=env:T@-a.example":      "no name as DNS",
		"T=env:T@bücher.example":  "xn--",
		"T=env:T@192.0.2.1":       "address",
		"T=env:T@[2001:db8::1]":   "NAME:PORT",
		"T=env:T@[::1]:443":       "address",
		"T=env:T@a.example:80":    "without TLS",
		"T=env:T@a.example:0":     "port",
		"T=env:T@a.example:65536": "port",
		"T=env:T@a.example:x":     "port",
		"T=env:T@https://a.b":     "port",
		"T=env:T@" + strings.Repeat("a.", 130) + "b":                                 "bytes",
		"T=env:T@" + strings.Repeat("a", 64) + ".b":                                  "no name as DNS",
		"T=env:T@" + strings.TrimSuffix(strings.Repeat("a,", MaxSecretHosts+1), ","): "too many",
	} {
		_, err := ParseSecret(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v, want %q", text, err, want)
		} else if strings.Contains(err.Error(), "ghp_value") {
			t.Errorf("%s: the error repeats what may be the secret: %v", text, err)
		}
	}
}

func TestValidateSecrets(t *testing.T) {
	t.Parallel()
	deny := &EgressPolicy{Default: EgressDeny}
	good := Secret{Name: "T", Source: "env:T", Hosts: []string{"a.example"}}
	for _, test := range []struct {
		what   string
		config VMConfig
		field  string
	}{
		{"good", VMConfig{Egress: deny, Secrets: []Secret{good}}, ""},
		{"no policy", VMConfig{Secrets: []Secret{good}}, "secrets"},
		{"open policy", VMConfig{Egress: &EgressPolicy{}, Secrets: []Secret{good}}, "secrets"},
		{"DNS only", VMConfig{Egress: &EgressPolicy{Default: EgressDNSOnly}, Secrets: []Secret{good}}, "secrets"},
		{"twice", VMConfig{Egress: deny, Secrets: []Secret{good, good}}, "secrets[1].name"},
		{"variable", VMConfig{Egress: deny, Secrets: []Secret{good}, Env: map[string]string{"T": ""}}, "secrets[0].name"},
		{"no agent", VMConfig{Egress: deny, Secrets: []Secret{good}, KernelPath: "k", RootfsPath: "r"}, "secrets"},
		{"no host", VMConfig{Egress: deny, Secrets: []Secret{{Name: "T", Source: "env:T"}}}, "secrets[0].hosts"},
		{"too many", VMConfig{Egress: deny, Secrets: make([]Secret, MaxSecrets+1)}, "secrets"},
	} {
		test.config.ID = "vm"
		err := test.config.WithDefaults().Validate()
		var invalid *ValidationError
		switch {
		case test.field == "":
			if err != nil {
				t.Errorf("%s: %v", test.what, err)
			}
		case !errors.As(err, &invalid) || invalid.Fields[0].Field != test.field:
			t.Errorf("%s: %v, want %s", test.what, err, test.field)
		}
	}
}
