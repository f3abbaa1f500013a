package distro_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/deb/debtest"
	"github.com/smolvm/smolvm/internal/image/distro"
)

func newMirror(t *testing.T, options string, packages ...debtest.Package) *debtest.Mirror {
	t.Helper()
	var debs []debtest.Deb
	for _, p := range packages {
		debs = append(debs, p.Deb(t))
	}
	return debtest.NewMirror(t, options, debs...)
}

// distribution returns packages of a small one.
func distribution() []debtest.Package {
	of := func(name, fields string) debtest.Package {
		control := strings.ReplaceAll(debtest.Control(name, fields), "amd64", runtime.GOARCH)
		return debtest.Package{Name: name, Control: control, Entries: []debtest.Entry{debtest.Dir("./"), debtest.File("./usr/share/"+name, strings.Repeat(name, 1<<14))}}
	}
	return []debtest.Package{
		of("base", "Essential: yes\nPriority: required\n"), of("needed", "Priority: required\n"), of("apt", "Priority: important\nDepends: base\n"),
		of("app", "Priority: optional\nDepends: lib\nRecommends: more\n"), of("lib", "Priority: optional\n"), of("more", "Priority: optional\n"),
		of("broken", "Priority: optional\nDepends: nowhere\n"), of("rest", "Priority: optional\n"),
	}
}

func testRelease() distro.Release {
	return distro.Release{ID: "debian", Codename: "test", Arch: runtime.GOARCH}
}

func openSource(t *testing.T) *distro.Source {
	t.Helper()
	source, err := distro.OpenSource(filepath.Join(t.TempDir(), "packages"), testRelease())
	if err != nil {
		t.Fatal(err)
	}
	return source
}

func update(t *testing.T, source *distro.Source) {
	t.Helper()
	if warning, err := source.Update(t.Context(), func(float64) {}); err != nil || warning != "" {
		t.Fatal(warning, err)
	}
}

// plan returns the names of the packages that an image has, in some order.
func plan(t *testing.T, source *distro.Source, recipe distro.Recipe) []distro.Package {
	t.Helper()
	planned, err := source.Plan(t.Context(), recipe)
	if err != nil {
		t.Fatal(err)
	}
	return planned
}

func TestSource(t *testing.T) {
	m := newMirror(t, "[trusted=yes]", distribution()...)
	source := openSource(t)
	update(t, source)
	names := func(recipe distro.Recipe) string {
		has := map[string]bool{}
		for _, p := range plan(t, source, recipe) {
			has[p.Name] = true
		}
		var list []string
		for _, p := range distribution() {
			if has[p.Name] {
				list = append(list, p.Name)
			}
		}
		return strings.Join(list, " ")
	}
	for _, test := range []struct {
		recipe distro.Recipe
		want   string
	}{
		{distro.Recipe{}, "base needed apt"},
		{distro.Recipe{Packages: []string{"app"}}, "base needed apt app lib"},
		{distro.Recipe{Packages: []string{"app=1.0-1"}, Recommends: true}, "base needed apt app lib more"},
	} {
		if got := names(test.recipe); got != test.want {
			t.Errorf("%q has %q, want %q", test.recipe.Packages, got, test.want)
		}
	}

	recipe := distro.Recipe{Packages: []string{"app"}}
	planned := plan(t, source, recipe)
	missing, err := source.Missing(t.Context(), recipe)
	if want := int64(5 * len(m.Files["pool/app.deb"])); err != nil || missing < want/2 || missing > 2*want {
		t.Errorf("%d bytes are missing (%v), want some %d", missing, err, want)
	}
	m.Cut.Store(1)
	files, err := source.Fetch(t.Context(), recipe, planned, func(float64) {})
	if err != nil {
		t.Fatal(err)
	}
	if m.Resumed.Load() == 0 {
		t.Error("what was cut off did not go on")
	}
	for i, p := range planned {
		content, err := os.ReadFile(files[i])
		if err != nil || !bytes.Equal(content, m.Files["pool/"+p.Name+".deb"]) {
			t.Errorf("package %s is not what the mirror has: %v", p.Name, err)
		}
	}
	if missing, err := source.Missing(t.Context(), recipe); err != nil || missing != 0 {
		t.Errorf("%d bytes are missing (%v) when all is there", missing, err)
	}

	mirrors, err := source.Mirrors(t.Context())
	if want := "URIs: " + m.URL + "/\nSuites: test\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"; err != nil || !strings.Contains(mirrors, want) {
		t.Errorf("the guest's mirrors are %q (%v)", mirrors, err)
	}

	t.Run("lists of before", func(t *testing.T) {
		m.Edit(func() { m.Files = nil })
		warning, err := source.Update(t.Context(), func(float64) {})
		if err != nil || warning == "" {
			t.Errorf("it warns of %q, %v", warning, err)
		}
		if _, err := source.Fetch(t.Context(), recipe, planned, func(float64) {}); err != nil {
			t.Errorf("what is there is fetched: %v", err)
		}
		recipe := distro.Recipe{Packages: []string{"rest"}}
		_, err = source.Fetch(t.Context(), recipe, nil, func(float64) {})
		if err == nil || !strings.Contains(err.Error(), "404") || hintOf(err) == "" {
			t.Errorf("the error is %v, with the hint %q", err, hintOf(err))
		}
	})
}

func hintOf(err error) string {
	if hinted, ok := errors.AsType[*smolvm.Error](err); ok {
		return hinted.Hint
	}
	return ""
}

func TestPlanSaysWhatIsWrong(t *testing.T) {
	newMirror(t, "[trusted=yes]", distribution()...)
	source := openSource(t)
	update(t, source)
	for name, want := range map[string]string{
		"nonesuch": "debian test has no package nonesuch", "broken": "broken : Depends: nowhere", "app=2.0": "'2.0' for 'app'",
	} {
		_, err := source.Plan(t.Context(), distro.Recipe{Packages: []string{name}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("of %s it says %v, and should have %q", name, err, want)
		}
	}
}

func TestUpdateRefusesUnsigned(t *testing.T) {
	newMirror(t, "", distribution()...)
	_, err := openSource(t).Update(t.Context(), func(float64) {})
	if err == nil || !strings.Contains(err.Error(), "signed") || hintOf(err) == "" {
		t.Errorf("the error is %v, with the hint %q", err, hintOf(err))
	}
}

// Lists that another has changed are refused, also where there are lists of before.
func TestUpdateRefusesBadSignature(t *testing.T) {
	gpg, err := exec.LookPath("gpg")
	if err != nil {
		t.Skip("gpg is not on this host")
	}
	home := t.TempDir()
	if err := os.Chmod(home, 0o700); err != nil {
		t.Fatal(err)
	}
	run := func(stdin []byte, args ...string) []byte {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), gpg, append([]string{"--homedir", home, "--batch", "--passphrase", "", "--pinentry-mode", "loopback"}, args...)...)
		cmd.Stdin = bytes.NewReader(stdin)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %q: %v: %s", args, err, &errs)
		}
		return out
	}
	run(nil, "--quick-gen-key", "test@example.com", "ed25519", "sign", "never")
	t.Cleanup(func() {
		// It starts an agent of its own.
		_ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
	})
	key := filepath.Join(t.TempDir(), "key.gpg")
	if err := os.WriteFile(key, run(nil, "--export"), 0o644); err != nil {
		t.Fatal(err)
	}
	m := newMirror(t, "[signed-by="+key+"]", distribution()...)
	signed := run(m.Files["dists/test/Release"], "--clearsign")
	m.Edit(func() { m.Files["dists/test/InRelease"] = signed })
	source := openSource(t)
	update(t, source)
	m.Edit(func() {
		m.Files["dists/test/InRelease"] = bytes.Replace(signed, []byte("Suite: test"), []byte("Suite: fest"), 1)
		m.Changed = m.Changed.Add(time.Hour)
	})
	_, err = source.Update(t.Context(), func(float64) {})
	if err == nil || !strings.Contains(err.Error(), "not signed by a key of this host") {
		t.Errorf("the error is %v", err)
	}
}

func TestUpdateWithoutNetwork(t *testing.T) {
	newMirror(t, "[trusted=yes]", distribution()...)
	debtest.ConfigureAPT(t, "deb [trusted=yes] http://127.0.0.1:1 test main\n")
	_, err := openSource(t).Update(t.Context(), func(float64) {})
	if err == nil || !strings.Contains(err.Error(), "fetch package lists") || !strings.Contains(err.Error(), "127.0.0.1") || hintOf(err) == "" {
		t.Errorf("the error is %v, with the hint %q", err, hintOf(err))
	}
}

// A package that another source of the host's has too is the distribution's.
func TestOwnReleaseIsPreferred(t *testing.T) {
	own := newMirror(t, "[trusted=yes]", distribution()...)
	newer := debtest.Package{Name: "rest", Control: strings.ReplaceAll(debtest.Control("rest", "Priority: optional\n"), "amd64", runtime.GOARCH)}
	newer.Control = strings.Replace(newer.Control, "Version: 1.0-1", "Version: 9.0-1", 1)
	extra := debtest.Package{Name: "extra", Control: strings.ReplaceAll(debtest.Control("extra", "Priority: optional\n"), "amd64", runtime.GOARCH)}
	other := newMirror(t, "[trusted=yes]", newer, extra)
	changed := bytes.Replace(other.Files["dists/test/Release"], []byte("Origin: Debian"), []byte("Origin: Others"), 1)
	other.Edit(func() { other.Files["dists/test/Release"] = changed })
	debtest.ConfigureAPT(t, fmt.Sprintf("deb [trusted=yes] %s test main\ndeb [trusted=yes] %s test main\n", own.URL, other.URL))
	source := openSource(t)
	update(t, source)
	versions := map[string]string{}
	for _, p := range plan(t, source, distro.Recipe{Packages: []string{"rest", "extra"}}) {
		versions[p.Name] = p.Version
	}
	if versions["rest"] != "1.0-1" || versions["extra"] != "1.0-1" {
		t.Errorf("the versions are %v", versions)
	}
	if mirrors, err := source.Mirrors(t.Context()); err != nil || strings.Contains(mirrors, other.URL) {
		t.Errorf("the guest's mirrors are %q (%v)", mirrors, err)
	}
}
