package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/manager"
	"github.com/smolvm/smolvm/shim"
)

func TestMain(m *testing.M) {
	shim.Main()
	os.Exit(m.Run())
}

// junit is what both test runners write.
type junit struct {
	Cases []struct {
		Name    string    `xml:"name,attr"`
		Failure *struct{} `xml:"failure"`
	} `xml:"testcase"`
	Suites []junit `xml:"testsuite"`
}

// count returns how many tests have passed and failed.
func (r junit) count() (passed, failed int) {
	for _, c := range r.Cases {
		if c.Failure != nil {
			failed++
		} else {
			passed++
		}
	}
	for _, suite := range r.Suites {
		p, f := suite.count()
		passed, failed = passed+p, failed+f
	}
	return passed, failed
}

// index is a package index of the test's own.
type index struct {
	url *url.URL
	// allow is the rule by which a guest reaches it.
	allow string
	// fetched counts packages that were fetched.
	fetched atomic.Int32
}

// serveIndex serves an index with one package of Python's and one of Node's at an address of this
// host's, as no guest reaches loopback.
func serveIndex(t *testing.T) *index {
	t.Helper()
	listener, err := net.Listen("tcp4", netip.AddrPortFrom(testenv.HostAddress(t), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	at := listener.Addr().(*net.TCPAddr)
	i := &index{url: &url.URL{Scheme: "http", Host: at.String()}, allow: fmt.Sprintf("allow @host:%d/tcp", at.Port)}
	dir := t.TempDir()
	writeWheel(t, filepath.Join(dir, "simple", "roman"))
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: i.handler(dir, tarball(t))}}
	server.Start()
	t.Cleanup(server.Close)
	return i
}

// The tests of a Python and a Node project are run in VMs, with packages from an index of one's own
// and nothing else within reach, from a mounted directory and by a Dockerfile.
func TestSuite(t *testing.T) {
	testenv.RequireQEMU(t)
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	testenv.OwnImages(t, data) // those of the Dockerfiles' steps have no names to be removed by
	testenv.NoProcesses(t, data)
	config := manager.Config{
		DataDir:   data,
		Embedded:  true,
		AgentPath: testenv.Agent(t),
		Templates: manager.TemplateConfig{Disabled: true}, // no two VMs are alike
	}
	m, err := manager.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	image := useImage(t, m)
	packages := serveIndex(t)

	// A test that fails is an error, and the result tells which.
	broken := filepath.Join(dir, "broken")
	if err := os.CopyFS(broken, os.DirFS("node")); err != nil {
		t.Fatal(err)
	}
	failing := "require('node:test').test('fails', () => { throw new Error('as it has to') })\n"
	if err := os.WriteFile(filepath.Join(broken, "broken.test.js"), []byte(failing), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, project  string
		passed, failed int
	}{
		{"python", "python", 3, 0},
		{"node", broken, 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := packages.fetched.Load()
			j := job{image: image, project: c.project, result: filepath.Join(dir, c.name+".xml"), index: packages.url, allow: []string{packages.allow}}
			if err := j.run(t.Context(), config); (err != nil) != (c.failed > 0) {
				t.Error(err)
			}
			text, err := os.ReadFile(j.result)
			if err != nil {
				t.Fatal(err)
			}
			var result junit
			if err := xml.Unmarshal(text, &result); err != nil {
				t.Fatalf("%v: %s", err, text)
			}
			if passed, failed := result.count(); passed != c.passed || failed != c.failed {
				t.Errorf("%d tests passed and %d failed, want %d and %d: %s", passed, failed, c.passed, c.failed, text)
			}
			if got := packages.fetched.Load() - before; got != 1 {
				t.Errorf("%d packages were fetched, want 1", got)
			}
			if _, err := os.Stat(filepath.Join(c.project, "node_modules")); err == nil {
				t.Error("what was installed is in the project's directory")
			}
		})
	}
	dockerfiles := map[string]string{"python": "3 passed"}
	if testenv.Dev() { // npm takes long to start where there is no KVM
		dockerfiles["node"] = "# pass 1\n"
	}
	for project, want := range dockerfiles {
		t.Run("Dockerfile of "+project, func(t *testing.T) {
			before := packages.fetched.Load()
			if got := byDockerfile(t, m, image, project, packages); !strings.Contains(got, want) {
				t.Errorf("it says %q, want %q", got, want)
			}
			if got := packages.fetched.Load() - before; got != 1 {
				t.Errorf("%d packages were fetched, want 1", got)
			}
		})
	}
	if left, err := os.ReadDir(filepath.Join(data, "disks")); err != nil || len(left) > 0 {
		t.Errorf("disks are left: %v, %v", left, err)
	}
}

// byDockerfile builds an image by a project's Dockerfile, and returns what its command says in a VM
// that reaches nothing.
func byDockerfile(t *testing.T, m *manager.Manager, base, project string, packages *index) string {
	t.Helper()
	_, err := m.BuildDockerfile(t.Context(), smolvm.DockerfileOptions{
		Context: project,
		Tags:    []string{project + "-suite"},
		Args: map[string]string{
			"BASE":                base,
			"PIP_INDEX_URL":       packages.url.JoinPath("simple").String(),
			"PIP_TRUSTED_HOST":    packages.url.Host,
			"NPM_CONFIG_REGISTRY": packages.url.JoinPath("npm").String(),
		},
		VM: smolvm.VMConfig{MemoryMiB: memoryMiB, Egress: &smolvm.EgressPolicy{Default: smolvm.EgressDeny, Rules: []string{packages.allow}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	result, err := m.Run(t.Context(), smolvm.VMConfig{
		Image: project + "-suite", MemoryMiB: memoryMiB, Network: smolvm.Network{Mode: smolvm.NetworkNone},
	}, smolvm.Command{})
	if err != nil {
		t.Fatal(err)
	}
	if !result.Success() {
		t.Errorf("it ended with %s: %s", result.ExitStatus, result.Stderr)
	}
	return string(result.Stdout)
}

// useImage gives a data directory the image to test with, and returns its name. It is built once and
// kept in the cache of tests, as an archive.
func useImage(t *testing.T, m *manager.Manager) string {
	t.Helper()
	recipe, err := distro.ReadRecipe(filepath.Join("testdata", "suite.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if dev, ok := distro.BuiltIn("dev"); ok && testenv.Dev() {
		// The tests reach no network that has pytest, so the distribution's comes with it.
		dev.Name, dev.Packages = "dev-suite", append(dev.Packages, "python3-pytest")
		recipe = dev
	}
	key, err := recipe.Key(distro.HostRelease(runtime.GOARCH))
	if err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(testenv.Cache(t), recipe.Name+"-"+key[:12]+".tar")
	unlock, err := flock.At(t.Context(), filepath.Join(testenv.Cache(t), recipe.Name+".lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	archive, err := os.Open(kept)
	if errors.Is(err, os.ErrNotExist) {
		build(t, m, recipe, kept)
		return recipe.Name
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = archive.Close() }()
	if _, err := m.ImportImage(t.Context(), smolvm.ImportOptions{Archive: archive, Name: recipe.Name}); err != nil {
		t.Fatal(err)
	}
	return recipe.Name
}

// build builds an image of packages, and keeps it as an archive in place of earlier ones.
func build(t *testing.T, m *manager.Manager, recipe distro.Recipe, kept string) {
	t.Helper()
	text, err := yaml.Marshal(recipe)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "recipe.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = m.BuildImage(t.Context(), smolvm.BuildOptions{RecipeFile: file})
	if errors.Is(err, distro.ErrNoPackages) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	earlier, err := filepath.Glob(filepath.Join(filepath.Dir(kept), recipe.Name+"-*.tar*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range earlier {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	archive, err := os.Create(kept + ".new")
	if err != nil {
		t.Fatal(err)
	}
	err = m.ExportImage(t.Context(), recipe.Name, smolvm.ExportOptions{Archive: archive})
	if err = errors.Join(err, archive.Close()); err == nil {
		err = os.Rename(archive.Name(), kept)
	}
	if err != nil {
		t.Fatal(err)
	}
}
