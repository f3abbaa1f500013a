package manager_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/deb"
	"github.com/smolvm/smolvm/internal/image/deb/debtest"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/testenv"
)

// essentialDebs returns the packages of this host's distribution that every image has. They are
// downloaded once.
func essentialDebs(t *testing.T) map[string]debtest.Deb {
	t.Helper()
	builder := distro.Builder{Dir: filepath.Join(testenv.Cache(t), "packages")}
	unlock, err := builder.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	source, err := distro.OpenSource(builder.Dir, distro.HostRelease(runtime.GOARCH))
	if err != nil {
		t.Skip("this host has no packages of Debian or Ubuntu: ", err)
	}
	quiet := func(float64) {}
	if _, err := source.Update(t.Context(), quiet); err != nil {
		t.Fatal(err)
	}
	plan, err := source.Plan(t.Context(), distro.Recipe{})
	if err != nil {
		t.Fatal(err)
	}
	files, err := source.Fetch(t.Context(), distro.Recipe{}, plan, quiet)
	if err != nil {
		t.Fatal(err)
	}
	debs := map[string]debtest.Deb{}
	for i, p := range plan {
		content, err := os.ReadFile(files[i])
		if err != nil {
			t.Fatal(err)
		}
		opened, err := deb.Read(bytes.NewReader(content), int64(len(content)))
		if err != nil {
			t.Fatal(err)
		}
		debs[p.Name] = debtest.Deb{Name: p.Name, Control: opened.Control.String(), Content: content}
	}
	return debs
}

var dependency = regexp.MustCompile(`[a-z0-9][a-z0-9+.-]+`)

// withDependencies returns packages and what they depend on, of those that are there.
func withDependencies(t *testing.T, all map[string]debtest.Deb, names ...string) []debtest.Deb {
	t.Helper()
	var list []debtest.Deb
	taken := map[string]bool{}
	for len(names) > 0 {
		name := names[0]
		names = names[1:]
		p, ok := all[name]
		if taken[name] || !ok {
			continue
		}
		taken[name] = true
		list = append(list, p)
		control, err := deb.ParseParagraph(p.Control)
		if err != nil {
			t.Fatal(err)
		}
		for relation := range strings.SplitSeq(control.Get("Pre-Depends")+","+control.Get("Depends"), ",") {
			names = append(names, dependency.FindString(relation))
		}
	}
	return list
}

// An image of packages is built by the same steps as a whole one, of a small distribution: what dpkg
// itself needs, and a package whose scripts tell that they were run, and in which order.
func TestImageOfPackages(t *testing.T) {
	m := openReal(t)
	all := essentialDebs(t)
	base := withDependencies(t, all, "base-files", "base-passwd", "coreutils", "dash", "diffutils", "dpkg", "findutils", "libc-bin", "mawk", "mount", "sed", "grep", "usr-is-merged")
	of := func(p debtest.Package) debtest.Deb {
		p.Control = strings.ReplaceAll(p.Control, "amd64", runtime.GOARCH)
		return p.Deb(t)
	}
	script := func(text string) string { return "#!/bin/sh\nset -e\n" + text + "\n" }
	told := of(debtest.Package{
		Name: "told", Control: debtest.Control("told", "Priority: optional\nDepends: library, ca-certificates\n"),
		Info: map[string]string{
			"preinst": script(`echo "preinst $1 $DPKG_MAINTSCRIPT_PACKAGE" >> /var/lib/told`), "conffiles": "/etc/told.conf\n",
			"postinst": script(`[ "$1" = configure ] || { echo "postinst $*" >> /var/lib/told; exit 0; }
				echo "postinst $1 $(cat /etc/told.conf) $(id -u) $(cat /var/lib/library)" >> /var/lib/told; dpkg-trigger --no-await told; chown games /etc/told.conf; test ! -e /sys/class/net/eth0`),
			"triggers": "interest-noawait told\n",
		},
		Entries: []debtest.Entry{debtest.Dir("./"), debtest.Dir("./etc"), debtest.File("./etc/told.conf", "settings\n"), debtest.File("./bin/told", "#!/bin/sh\ncat /var/lib/told\n")},
	})
	library := of(debtest.Package{
		Name: "library", Control: debtest.Control("library", "Priority: optional\nMulti-Arch: same\n"),
		Info:    map[string]string{"postinst": script("echo ready > /var/lib/library")},
		Entries: []debtest.Entry{debtest.Dir("./"), debtest.Dir("./usr/share/man/man1"), debtest.File("./usr/share/man/man1/library.1", "x")},
	})
	// Certificates are collected by its script, again only if there is something new.
	collect := debtest.File("./usr/sbin/update-ca-certificates", script("echo collected $* >> /var/lib/collected"))
	collect.Mode = 0o755
	certificates := of(debtest.Package{
		Name: "ca-certificates", Control: debtest.Control("ca-certificates", "Priority: optional\nDepends: findutils\n"),
		Info: map[string]string{"postinst": script(`update-ca-certificates --hooksdir ""; update-ca-certificates
			touch /etc/ca-certificates.conf; update-ca-certificates; update-ca-certificates`)},
		Entries: []debtest.Entry{
			debtest.Dir("./"), debtest.File("./etc/ca-certificates.conf", ""), debtest.Dir("./etc/ca-certificates/update.d"),
			debtest.Dir("./usr/share/ca-certificates"), debtest.Dir("./usr/local/share/ca-certificates"),
			collect,
		},
	})
	apt := of(debtest.Package{Name: "apt", Control: debtest.Control("apt", "Priority: important\n"), Entries: []debtest.Entry{debtest.Dir("./")}})
	debtest.NewMirror(t, "[trusted=yes]", append(base, told, library, certificates, apt)...)

	recipe := filepath.Join(t.TempDir(), "mine.yaml")
	err := os.WriteFile(recipe, []byte("name: told\npackages: [told]\nuser: games\nworkdir: /etc\nenv: {A: b}\nsetup: ['chmod 755 /bin/told', 'echo set up >> /var/lib/told']\n"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	var phases []string
	options := smolvm.BuildOptions{RecipeFile: recipe, Progress: func(p smolvm.Progress) { phases = append(phases, p.Phase) }}
	built, err := m.BuildImage(t.Context(), options)
	if err != nil {
		t.Fatalf("%v; it went so far: %q", err, phases)
	}
	t.Cleanup(func() {
		if err := m.RemoveImage(context.WithoutCancel(t.Context()), built.Digest); err != nil {
			t.Error(err)
		}
	})
	again, err := m.BuildImage(t.Context(), options)
	if err != nil || again.Digest != built.Digest {
		t.Errorf("it is built again: %s, %v", again.Digest, err)
	}
	result, err := m.Run(t.Context(), smolvm.VMConfig{Image: "told"}, smolvm.Command{Args: []string{"sh", "-ec",
		`told; pwd; id -un; echo $A; dpkg --audit; dpkg-query -W -f '${binary:Package} ${db:Status-Status}\n' told library; stat -c %U told.conf
		ls /usr/share/man/man1/library* 2>/dev/null || test -d /usr/share/man/man1; readlink /bin; grep -c exclude /etc/dpkg/dpkg.cfg.d/smolvm; ls /run/configure 2>&1 | grep -c cannot; cat /var/lib/collected`}})
	want := "preinst install told\npostinst configure settings 0 ready\npostinst triggered told\nset up\n" +
		"/etc\ngames\nb\nlibrary:" + runtime.GOARCH + " installed\ntold installed\ngames\nusr/bin\n7\n1\ncollected --hooksdir\ncollected\n"
	if err != nil || string(result.Stdout) != want {
		t.Errorf("it says %q (%q, %v), want %q", result.Stdout, result.Stderr, err, want)
	}
}
