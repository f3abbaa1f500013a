package registries

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/image/ociref"
)

const example = `
unqualified-search-registries = ["example.com"]
[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "127.0.0.1:5000/hub"
[[registry.mirror]]
location = "mirror"
pull-from-mirror = "digest-only"

[[registry]]
prefix = "docker.io/library"
location = "internal.example/official"

[[registry]]
prefix = "*.blocked.example"
blocked = true

[[registry]]
prefix = "*.wild.example"
mirror-by-digest-only = true
[[registry.mirror]]
location = "cache.example/wild"
`

func write(t *testing.T, text string, path ...string) string {
	t.Helper()
	name := filepath.Join(path...)
	err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(text), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestSources(t *testing.T) {
	config, err := load(write(t, example, t.TempDir(), "conf"), nil)
	if err != nil {
		t.Fatal(err)
	}
	digest := "@sha256:" + strings.Repeat("ab", 32)
	for name, want := range map[string][]string{
		"owner/app:1":               {"127.0.0.1:5000/hub/owner/app:1", "docker.io/owner/app:1"},
		"owner/app" + digest:        {"127.0.0.1:5000/hub/owner/app" + digest, "mirror/owner/app" + digest, "docker.io/owner/app" + digest},
		"python":                    {"internal.example/official/python:latest"},
		"docker.io/library2/a":      {"127.0.0.1:5000/hub/library2/a:latest", "docker.io/library2/a:latest"},
		"ghcr.io/owner/app":         {"ghcr.io/owner/app:latest"},
		"a.wild.example/x":          {"a.wild.example/x:latest"},
		"a.wild.example/x" + digest: {"cache.example/wild/x" + digest, "a.wild.example/x" + digest},
		"a.blocked.example/x":       nil,
	} {
		ref, err := ociref.Parse(name)
		if err != nil {
			t.Fatal(err)
		}
		sources, err := config.Sources(ref)
		var got []string
		for _, source := range sources {
			got = append(got, source.String())
		}
		if want == nil != errors.Is(err, ErrBlocked) || want != nil && err != nil || !slices.Equal(got, want) {
			t.Errorf("%s is fetched from %q, %v; want %q", name, got, err, want)
		}
	}
}

// The user's file takes the place of the host's, and drop-ins that of tables for the same prefix.
func TestFiles(t *testing.T) {
	etc, home := t.TempDir(), t.TempDir()
	host := func(config Config) string {
		t.Helper()
		sources, err := config.Sources(ociref.Ref{Registry: "a.example", Repository: "x", Tag: "1"})
		if err != nil {
			t.Fatal(err)
		}
		return sources[0].Registry
	}
	table := func(location string) string {
		return "[[registry]]\nprefix = 'a.example'\nlocation = '" + location + "'\n"
	}
	for _, step := range []struct {
		path []string
		want string
	}{
		{[]string{etc, "registries.conf"}, "etc.example"},
		{[]string{home, "registries.conf"}, "home.example"},
		{[]string{etc, "registries.conf.d", "1.conf"}, "drop-in.example"},
		{[]string{home, "registries.conf.d", "0.conf"}, "own-drop-in.example"},
	} {
		write(t, table(step.want), step.path...)
		config, err := load("", []string{etc, home})
		if err != nil || host(config) != step.want {
			t.Errorf("with %q it is at %s, %v", step.path, host(config), err)
		}
	}
	if config, err := load("", []string{t.TempDir()}); err != nil || host(config) != "a.example" {
		t.Errorf("without a file it is at %s, %v", host(config), err)
	}
	for _, bad := range []string{"[[registry]]\n", "[[registry", "[[registry]]\nprefix = 1\n"} {
		if _, err := load(write(t, bad, t.TempDir(), "conf"), nil); err == nil {
			t.Errorf("%q is a configuration", bad)
		}
	}
	if _, err := load(filepath.Join(etc, "nothing"), nil); err == nil {
		t.Error("a file that is named and not there is passed over")
	}
}
