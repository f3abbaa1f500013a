// Package deptest checks which packages of this module import which.
package deptest

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/smolvm/smolvm"

// pkg is what `go list` tells of a package.
type pkg struct {
	ImportPath string
	Dir        string
	Imports    []string
	Deps       []string
	Standard   bool
}

func list(t *testing.T, args ...string) map[string]pkg {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list", "-json=ImportPath,Dir,Imports,Deps,Standard"}, args...)...).Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	packages := map[string]pkg{}
	decoder := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages[p.ImportPath] = p
		if !p.Standard {
			// The go command sees by this on what the test's result depends, and does
			// not take an earlier one from its cache.
			if _, err := os.ReadDir(p.Dir); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// tiers returns the tiers of packages, the lowest first. A package may import packages of
// lower tiers, and those that have the same name here: a name stands for all packages of the
// folder. A package belongs to the longest name that its path begins with.
func tiers() [][]string {
	return [][]string{
		{"."}, // the contract
		{ // ground: knows nothing of VMs
			"internal/cgroup", "internal/compat", "internal/dirfd", "internal/diskspace", "internal/durable", "internal/errcode", "internal/flock", "internal/fuserelay", "internal/glob", "internal/health", "internal/ocitar", "internal/proc",
			"internal/ring", "internal/size", "internal/step", "internal/stream", "internal/termsafe",
		},
		{"internal/changes", "internal/datadir", "internal/disk", "internal/flowlog", "internal/hostdir", "internal/namespace"}, // files, and programs in namespaces
		{ // nouns
			"internal/agent", "internal/backing", "internal/host", "internal/image", "internal/network",
			"internal/snapshot", "internal/store", "internal/vmm",
		},
		// Rooms that need no shim.
		{"internal/budget", "internal/catalog", "internal/identity", "internal/machine", "internal/secret", "internal/worker", "internal/workspace"},
		{"internal/dockerbuild"},  // images from Dockerfiles
		{"internal/distroimage"},  // images of packages, which are configured in VMs
		{"internal/shim"},         // one running VM
		{"internal/session"},      // one guest, in that process
		{"internal/shim/process"}, // that process
		{"internal/template"},     // guests that were saved before anybody wanted them
		{"internal/warmpool"},     // VMs that wait for their users
		{"internal/start"},        // the ways to start a VM
		{"internal/teardown"},     // its end
		{"manager"},               // the engine
		{"internal/shim/program"}, // what programs are that serve as shims
		{"shim"},                  // the same, with backends
		{"internal/cli"},
		{"cmd", "bench", "examples", "test"},
	}
}

// place returns a package's tier, and the name by which it is in it. Packages for tests only
// are in none: they may import all that they need.
func place(path string) (tier int, name string, ok bool) {
	for i, names := range tiers() {
		for _, n := range names {
			if (path == n || strings.HasPrefix(path, n+"/")) && len(n) > len(name) {
				tier, name, ok = i, n, true
			}
		}
	}
	return tier, name, ok
}

// forTests reports whether a package is for tests only.
func forTests(path string) bool {
	for _, name := range testPackages() {
		if path == name || strings.HasPrefix(path, name+"/") {
			return true
		}
	}
	return strings.HasPrefix(path, "internal/") && (strings.HasSuffix(path, "test") || strings.HasSuffix(path, "fake"))
}

// testPackages are the packages for tests only whose names don't say so.
func testPackages() []string { return []string{"internal/testenv"} }

// onlyBy returns the packages that only one other may import, each with that other.
func onlyBy() map[string]string {
	return map[string]string{
		// Backends are wired in where a program becomes a shim, and nothing else has a
		// VMM or a TCP/IP stack in it.
		"internal/vmm/qemu":        "shim",
		"internal/shim/process":    "internal/shim/program",
		"internal/network/usernet": "internal/shim/process",
		"internal/session":         "internal/shim/process",
		"internal/cli":             "cmd/smolvm",
		// So is what a program does that launches a VMM in namespaces.
		"internal/namespace/launcher": "internal/shim/program",
	}
}

// wrong returns why one package of this module may not import another; empty if it may.
func wrong(from, to string) string {
	if forTests(from) {
		return ""
	}
	if forTests(to) {
		return "it is for tests only"
	}
	if only, ok := onlyBy()[to]; ok && from != only {
		return "only " + only + " may"
	}
	fromTier, fromName, fromOK := place(from)
	toTier, toName, toOK := place(to)
	switch {
	case !fromOK:
		return from + " is in no tier: give it one"
	case !toOK:
		return to + " is in no tier: give it one"
	case fromName == toName, toTier < fromTier, allowed()[imported{from, to}] != "":
		return ""
	case toTier == fromTier:
		return "peers don't import each other; a package of a higher tier moves data between them"
	}
	return "imports point downwards"
}

// allowed returns the imports of peers that are allowed, each with its reason.
func allowed() map[imported]string {
	return map[imported]string{
		{"internal/image", "internal/agent/wire"}: "the list of modules in an initramfs is read by the agent",
	}
}

// imported is an import of one package of this module by another.
type imported struct{ from, to string }

// short returns a package's path in this module; ok is false for one of another.
func short(path string) (_ string, ok bool) {
	if path == module {
		return ".", true
	}
	return strings.CutPrefix(path, module+"/")
}

func TestImports(t *testing.T) {
	packages := list(t, module+"/...")
	for path, p := range packages {
		from, _ := short(path)
		for _, imported := range p.Imports {
			if from == "." && strings.Contains(imported, ".") {
				t.Errorf("the root package imports %s: it is the contract, with the standard library only", imported)
			}
			if to, ours := short(imported); ours {
				if why := wrong(from, to); why != "" {
					t.Errorf("%s imports %s: %s", from, to, why)
				}
			}
		}
	}
	for _, rule := range staleRules(packages) {
		t.Error(rule)
	}
}

// staleRules returns what is wrong with the rules about packages that are gone: such a rule
// guards nothing.
func staleRules(packages map[string]pkg) []string {
	var stale []string
	has := func(name string) bool {
		for path := range packages {
			if p, ok := short(path); ok && (p == name || strings.HasPrefix(p, name+"/")) {
				return true
			}
		}
		return false
	}
	imports := func(i imported) bool {
		return slices.Contains(packages[module+"/"+i.from].Imports, module+"/"+i.to)
	}
	for _, names := range tiers() {
		for _, name := range names {
			if !has(name) {
				stale = append(stale, "a tier has "+name+", which is no package")
			}
		}
	}
	for only, by := range onlyBy() {
		if !imports(imported{by, only}) {
			stale = append(stale, by+" does not import "+only+", as the rules have it")
		}
	}
	for i, why := range allowed() {
		if !imports(i) {
			stale = append(stale, i.from+" does not import "+i.to+" any more, which it may as "+why)
		}
	}
	for _, name := range testPackages() {
		if !has(name) {
			stale = append(stale, name+" is said to be for tests, and is no package")
		}
	}
	for _, dep := range tooLargeForAgent() {
		if name, _, _ := strings.Cut(dep, "/"); !strings.Contains(name, ".") {
			continue // the standard library loses no package
		}
		begins := func(path string) bool { return strings.HasPrefix(path, dep) }
		if !slices.ContainsFunc(packages[module+"/cmd/smolvm"].Deps, begins) {
			stale = append(stale, "not even smolvm links "+dep+", which the agent must not: name what it links in its place")
		}
	}
	slices.Sort(stale)
	return stale
}

// Each rule is found out when a package that it names is gone.
func TestStaleRules(t *testing.T) {
	all := list(t, module+"/...")
	for _, test := range []struct{ gone, want string }{
		{"internal/ring", "internal/ring, which is no package"},
		{"test", "test, which is no package"},
		{".", "., which is no package"},
		{"internal/vmm/qemu", "shim does not import internal/vmm/qemu"},
		{"internal/agent/wire", "internal/image does not import internal/agent/wire"},
		{"internal/testenv", "internal/testenv is said to be for tests"},
		{"gvisor.dev", "not even smolvm links gvisor.dev/"},
	} {
		gone := module + "/" + test.gone
		switch test.gone {
		case ".":
			gone = module
		case "gvisor.dev":
			gone = test.gone
		}
		is := func(path string) bool { return path == gone || gone != module && strings.HasPrefix(path, gone+"/") }
		packages := map[string]pkg{}
		for path, p := range all {
			if !is(path) {
				p.Imports, p.Deps = slices.DeleteFunc(slices.Clone(p.Imports), is), slices.DeleteFunc(slices.Clone(p.Deps), is)
				packages[path] = p
			}
		}
		stale := staleRules(packages)
		if !slices.ContainsFunc(stale, func(rule string) bool { return strings.Contains(rule, test.want) }) {
			t.Errorf("without %s the stale rules are %q, want %q", test.gone, stale, test.want)
		}
	}
}

func TestRules(t *testing.T) {
	tests := []struct {
		from, to string
		want     bool
	}{
		{"manager", "internal/shim", true},
		{"manager", "internal/shim/process", false},
		{"manager", "internal/network/usernet", false},
		{"manager", "internal/vmm/qemu", false},
		{"manager", "internal/vmm/traits", true},
		{"internal/vmm/traits", "internal/vmm/qemu", false},
		{"manager", "shim", false},
		{"internal/shim", "internal/shim/process", false},
		{"internal/shim/process", "internal/shim", true},
		{"internal/shim/process", "manager", false},
		{"internal/shim/program", "manager", true},
		{"internal/teardown", "manager", false},
		{"internal/store", "internal/network", false},
		{"internal/store", "internal/datadir", true},
		{"internal/ring", "internal/disk", false},
		{"internal/image", "internal/agent/wire", true},
		{"internal/image", "internal/agent", false},
		{"internal/agent/guest", "internal/agent/wire", true},
		{"internal/cli", "shim", true},
		{"cmd/smolvm", "internal/testenv", false},
		{"internal/novelty", ".", false},
		{".", "internal/ring", false},
	}
	for _, test := range tests {
		if why := wrong(test.from, test.to); (why == "") != test.want {
			t.Errorf("%s imports %s: %q; may it: %v", test.from, test.to, why, test.want)
		}
	}
}

// A program that uses VMs has nothing in it of what runs them: that is in the shim.
func TestManagerLinksNoVMM(t *testing.T) {
	packages := list(t, module+"/manager", module+"/shim")
	for _, forbidden := range []string{"gvisor.dev/", module + "/internal/network/usernet", module + "/internal/shim/process", module + "/internal/vmm/qemu"} {
		begins := func(dep string) bool { return strings.HasPrefix(dep, forbidden) }
		if slices.ContainsFunc(packages[module+"/manager"].Deps, begins) {
			t.Errorf("package manager links %s", forbidden)
		}
		if !slices.ContainsFunc(packages[module+"/shim"].Deps, begins) {
			t.Errorf("package shim does not link %s any more: name what it links in its place", forbidden)
		}
	}
}

// What a guest may reach is decided by functions of plain data: they open nothing, ask
// nothing, and are the same whichever way a guest is connected.
func TestNetworkPolicyIsPure(t *testing.T) {
	path := module + "/internal/network"
	for _, dep := range list(t, path)[path].Deps {
		first, _, _ := strings.Cut(dep, "/")
		if dep != module && strings.Contains(first, ".") {
			t.Errorf("internal/network depends on %s: it has the standard library and the contract only", dep)
		}
	}
}

// maxAgent is how large the agent may be, in bytes.
const maxAgent = 6_000_000

func TestAgentSize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, module+"/cmd/smolvm-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build agent: %v\n%s", err, out)
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() > maxAgent {
		t.Errorf("the agent has %d bytes (%v); at most %d are allowed", info.Size(), err, maxAgent)
	}
}

// tooLargeForAgent are packages, or what their paths begin with, that smolvm links and that
// have no place in its agent.
func tooLargeForAgent() []string {
	return []string{"net/http", "database/sql", "modernc.org/", "github.com/spf13/cobra", "gvisor.dev/", "github.com/vishvananda/netlink"}
}

// The agent goes into every guest, and into memory that guests need.
func TestAgentStaysSmall(t *testing.T) {
	agent := list(t, module+"/cmd/smolvm-agent")[module+"/cmd/smolvm-agent"]
	for _, forbidden := range tooLargeForAgent() {
		for _, dep := range agent.Deps {
			if strings.HasPrefix(dep, forbidden) {
				t.Errorf("the agent depends on %s: it would not stay below 6 MB", dep)
			}
		}
	}
}
