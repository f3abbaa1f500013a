package distro_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/smolvm/smolvm/internal/image/distro"
)

func TestBuiltIn(t *testing.T) {
	t.Parallel()
	if got := strings.Join(distro.Names(), " "); got != "debian dev node python" {
		t.Errorf("the built-in names are %q", got)
	}
	for _, name := range distro.Names() {
		text, err := os.ReadFile(filepath.Join("recipes", name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		if recipe, err := distro.Parse(name+".yaml", text); err != nil || recipe.Name != name || recipe.Instead == "" {
			t.Errorf("%s: %+v, %v", name, recipe, err)
		}
		if _, ok := distro.BuiltIn(name); !ok {
			t.Errorf("%s is not built in", name)
		}
	}
	for _, name := range []string{"", "base", "../recipes/dev", "alpine"} {
		if _, ok := distro.BuiltIn(name); ok {
			t.Errorf("%q is built in", name)
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	recipe, err := distro.Parse("mine.yaml", []byte("name: mine\npackages: [git, 'g++', 'curl=7.88.1-10+deb12u15']\nenv: {B: 2, PATH: /opt/bin}\nsetup:\n- touch /x\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(recipe.Packages) != 3 || !slices.Equal(recipe.Environment(), []string{"B=2", "PATH=/opt/bin"}) || len(recipe.Setup) != 1 {
		t.Errorf("it reads as %+v, with the environment %q", recipe, recipe.Environment())
	}
	for text, want := range map[string]string{
		"":                                 "is empty",
		"name: x\npakages: [git]\n":        "line 2: there is no key pakages",
		"packages: git\n":                  "line 1",
		"name: [\n":                        "line",
		"packages: ['git; reboot']\n":      "no name of a package",
		"packages: [--allow-downgrades]\n": "no name of a package",
		"packages: ['?all']\n":             "no name of a package",
		"packages: [bash-]\n":              "no name of a package",
		"packages: ['git=']\n":             "no name of a package",
		"workdir: home\n":                  "no absolute path",
		"env: {'A=B': c}\n":                "no variable",
		"name: x\n---\nname: y\n":          "more than one document",
		"name: x\nname: y\n":               "line 2",
		"setup: [\"a\\0b\"]\n":             "NUL",
	} {
		if _, err := distro.Parse("mine.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "mine.yaml") {
			t.Errorf("%q: %v, and should have %q", text, err, want)
		}
	}
}

func TestReadRecipe(t *testing.T) {
	t.Parallel()
	large := filepath.Join(t.TempDir(), "large.yaml")
	if err := os.WriteFile(large, []byte("name: "+strings.Repeat("x", 2<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{large: "larger than", "/nonexistent/recipe": "no such file"} {
		if _, err := distro.ReadRecipe(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, and should have %q", path, err, want)
		}
	}
}

// The key changes with all that the image is made of, and with nothing else.
func TestKey(t *testing.T) {
	t.Parallel()
	release := testRelease()
	key := func(r distro.Recipe, on distro.Release) string {
		t.Helper()
		key, err := r.Key(on)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	one := key(distro.Recipe{Name: "one", Packages: []string{"git"}}, release)
	if one != key(distro.Recipe{Name: "two", Packages: []string{"git"}}, release) {
		t.Error("the name makes a difference")
	}
	other := release
	other.Codename = "other"
	for what, key := range map[string]string{
		"package": key(distro.Recipe{Packages: []string{"curl"}}, release), "line": key(distro.Recipe{Packages: []string{"git"}, Setup: []string{"x"}}, release),
		"release": key(distro.Recipe{Packages: []string{"git"}}, other), "user": key(distro.Recipe{Packages: []string{"git"}, User: "x"}, release),
	} {
		if key == one {
			t.Errorf("another %s makes no difference", what)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range distro.Names() {
		text, err := os.ReadFile(filepath.Join("recipes", name+".yaml"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		recipe, err := distro.Parse("fuzz.yaml", text)
		if err != nil {
			return
		}
		for _, name := range recipe.Packages {
			if strings.HasPrefix(name, "-") || strings.ContainsAny(name, " ?~!;\n") {
				t.Errorf("package %q is accepted", name)
			}
		}
	})
}
